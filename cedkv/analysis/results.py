"""From records to results: metrics, gates, statistics, and every file of ``outputs/{run_id}/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cedkv.analysis.paired import arm_comparisons
from cedkv.checks.gates import Check, all_pass, gate_a, gate_b, numerical_floor
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.metrics_phase2 import run_metrics


@dataclass(frozen=True)
class Records:
    """All records of a run, by type. ``selections`` may stay on disk, and the ON records of many samples come without
    ``topk``, which only the page's first samples need."""

    on: Sequence[Record]
    off: Sequence[Record]
    selections: Sequence[Record]
    plumbing: Sequence[Record]
    repro: Sequence[Record]


@dataclass(frozen=True)
class Results:
    """What a run says. ``verdicts`` has gateA, and in phase 2 also gateB and phase2: True is pass."""

    phase: str
    metrics: dict[str, float | None]
    checks: list[Check]
    verdicts: dict[str, bool]
    floor: float | None
    comparisons: list[dict[str, Any]]


def sort_records(records: Sequence[Record]) -> Records:
    """Split a run's records by type, keeping their order."""
    sample = [record for record in records if record["type"] == "sample"]
    return Records(
        on=[record for record in sample if record["kind"] == "on"],
        off=[record for record in sample if record["kind"] == "off"],
        selections=[record for record in records if record["type"] == "selection"],
        plumbing=[record for record in records if record["type"] == "plumbing"],
        repro=[record for record in records if record["type"] == "repro"],
    )


def decide(config: Phase2Config, records: Records, phase: str) -> Results:
    """Metrics, gates and statistics of a run; phase 1.5 decides Gate A alone."""
    checks = gate_a(config, records.on, records.plumbing, records.repro)
    metrics = run_metrics(records.on, records.off)
    verdicts = {"gateA": all_pass(checks)}
    metrics["phase2_gateA_pass"] = float(verdicts["gateA"])
    if phase == "2":
        checks_b = gate_b(config, metrics, len(records.on), len(records.off))
        checks = checks + checks_b
        verdicts["gateB"] = all_pass(checks_b)
        verdicts["phase2"] = verdicts["gateA"] and verdicts["gateB"]
        metrics["phase2_gateB_pass"] = float(verdicts["gateB"])
        metrics["phase2_pass"] = float(verdicts["phase2"])
    floor = numerical_floor(records.plumbing)
    metrics["phase2_numerical_floor"] = floor
    return Results(phase, metrics, checks, verdicts, floor, arm_comparisons(records.on, config.seed))


def verdict_word(value: bool) -> str:
    """``pass`` or ``fail``."""
    return "pass" if value else "fail"


@dataclass(frozen=True)
class ConditionResult:
    """One condition of a grid, finished.

    key: stable and unique in the grid, the changed settings: ``select.mode=random_span``.
    factors: the settings in which the grid's conditions differ, dotted name -> value of this condition.
    oracle: the condition knows the answer (it is a reference point, never a winner).
    reference: the condition is a reference point, not a candidate for ``best``.
    """

    key: str
    label: str
    run_id: str
    config: Phase2Config
    factors: dict[str, object]
    oracle: bool
    reference: bool
    records: Records
    results: Results
