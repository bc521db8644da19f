"""From records to results: a condition's records read once, its metrics, gates and statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cedkv.analysis.paired import arm_comparisons
from cedkv.checks.base import CheckResult, RunRecords
from cedkv.checks.gates import all_pass, judge_gate
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.metrics_phase2 import run_metrics
from cedkv.selectors.base import query_kind, selector_class
from cedkv.tasks.load import Unusable

GROUPS = ("query-aware candidates", "query-agnostic candidates", "reference points")
"""The groups that tables, page and figures list conditions in, in this order."""


class RecordSink(Protocol):
    """What is filled while a condition's records are read, one sample at a time."""

    def add_on(self, on: Record, selection: Record) -> None:
        """Take an ON sample (``OnRecord``) and what was selected for it (``SelectionRecord``)."""

    def add_off(self, off: Record) -> None:
        """Take an OFF prompt (``OffRecord``)."""


@dataclass(frozen=True)
class Records:
    """The records of a condition that figures are computed from, by type, in their order (``cedkv.records``).

    on: without ``topk``, which only the page's samples need. kept_tokens: how many each ON sample's prefix holds. heads: of
    every unit the attention to gold tokens.
    """

    on: Sequence[Record] = ()
    off: Sequence[Record] = ()
    plumbing: Sequence[Record] = ()
    repro: Sequence[Record] = ()
    kept_tokens: Sequence[int] = ()
    heads: Sequence[Record] = ()


@dataclass(frozen=True)
class Results:
    """What a condition's records say.

    checks: of the gates, then preconditions. verdicts: gateA, and in phase 2 also gateB and phase2: True is pass.
    """

    phase: str
    metrics: dict[str, float | None]
    checks: list[CheckResult]
    verdicts: dict[str, bool]
    floor: float | None
    comparisons: list[dict[str, Any]]

    @property
    def undecided(self) -> list[str]:
        """What the verdicts do not decide and why, as preconditions and checks say it."""
        preconditions_first = sorted(self.checks, key=lambda check: check.gate != "precondition")
        return list(dict.fromkeys(check.note for check in preconditions_first if check.note))


@dataclass(frozen=True)
class ConditionResult:
    """One condition of a run, finished.

    key: stable and unique in the grid, the changed settings: ``select.mode=random_span``; ``run`` for a single evaluation.
    factors: the settings in which the grid's conditions differ, dotted name -> value of this condition.
    notes, unusable: of its samples (``tasks.load.Samples``).
    """

    key: str
    label: str
    run_id: str
    config: Phase2Config
    records: Records
    results: Results
    factors: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unusable: tuple[Unusable, ...] = ()

    @property
    def role(self) -> str:
        """``candidate``, ``reference`` or ``oracle``, by its selector."""
        return selector_class(self.config.select.mode).role

    @property
    def oracle(self) -> bool:
        """Whether the condition knows the answer."""
        return self.role == "oracle"

    @property
    def reference(self) -> bool:
        """Whether the condition is a point of reference (an oracle is one too), not a candidate for ``best``."""
        return self.role != "candidate"

    @property
    def query(self) -> str:
        """``query-aware`` or ``query-agnostic``."""
        return query_kind(selector_class(self.config.select.mode))

    @property
    def group(self) -> str:
        """Its group, one of ``GROUPS``."""
        return "reference points" if self.reference else f"{self.query} candidates"


def collect(records: Iterable[Record], sinks: Sequence[RecordSink] = ()) -> Records:
    """Read a condition's records once; keep those that figures are computed from, and give every sample to the sinks.

    Args:
        records: of ``Journal.records``; the selection of an ON sample follows its record.
    """
    on: list[Record] = []
    kept: list[int] = []
    others: dict[str, list[Record]] = {"off": [], "plumbing": [], "repro": [], "heads": []}
    for record in records:
        kind = record["kind"] if record["type"] == "sample" else record["type"]
        if kind == "on":
            on.append(record)
        elif kind == "selection":
            for sink in sinks:
                sink.add_on(on[-1], record)
            on[-1].pop("topk", None)
            kept.append(len(record["kept_tokens"]))
        else:
            others[kind].append(record)
            if kind == "off":
                for sink in sinks:
                    sink.add_off(record)
    return Records(on, others["off"], others["plumbing"], others["repro"], kept, others["heads"])


def decide(config: Phase2Config, records: Records, phase: str) -> Results:
    """Compute metrics, gates, preconditions and statistics of a condition; phase 1.5 decides Gate A alone."""
    metrics = run_metrics(records.on, records.off, config.thresholds.off_delta_p99_max)
    run = RunRecords(config, records.on, records.off, records.plumbing, records.repro, dict(metrics))
    checks = judge_gate("A", run)
    verdicts = {"gateA": all_pass(checks)}
    metrics["phase2_gateA_pass"] = float(verdicts["gateA"])
    if phase == "2":
        checks_b = judge_gate("B", run)
        checks = checks + checks_b + judge_gate("precondition", run)
        verdicts["gateB"] = all_pass(checks_b)
        verdicts["phase2"] = verdicts["gateA"] and verdicts["gateB"]
        metrics["phase2_gateB_pass"] = float(verdicts["gateB"])
        metrics["phase2_pass"] = float(verdicts["phase2"])
    metrics["phase2_numerical_floor"] = run.floor
    return Results(phase, metrics, checks, verdicts, run.floor, arm_comparisons(records.on, config.seed))


def verdict_word(value: bool) -> str:
    """Return ``pass`` or ``fail``."""
    return "pass" if value else "fail"
