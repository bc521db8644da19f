"""From records to results: metrics, gates, statistics, and every file of ``outputs/{run_id}/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cedkv.config import Phase2Config
from cedkv.gates import Check, all_pass, gate_a, gate_b, numerical_floor
from cedkv.metrics_phase2 import run_metrics
from cedkv.report.files import write_json
from cedkv.stats import arm_comparisons
from cedkv.types import Record

_OFF_KEYS = ("sample_id", "prompt_text", "token_ids", "state_of")


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


def modes(config: Phase2Config) -> dict[str, str]:
    """How prefixes are made; the same in configuration, report and artifacts."""
    return {
        "select_mode": config.select.mode,
        "positioning_mode": config.injection.positioning_mode,
        "padding_mode": config.prefix.padding_mode,
        "kv_source": config.prefix.kv_source,
    }


def write_results(
    folder: Path,
    run_id: str,
    config: Phase2Config,
    records: Records,
    results: Results,
    sources: dict[str, str],
    runtime: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Write the report and the artifacts.

    Args:
        runtime: facts about model, device and versions (``hf_runtime_meta.json``).
        seconds: wall time by stage.
    """
    bos = records.selections[0]["demo_token_ids"][0] if _has_bos(records) else None
    write_json(
        folder / "report_phase2.json",
        {
            "run_id": run_id,
            "phase": results.phase,
            "verdicts": {name: verdict_word(value) for name, value in results.verdicts.items()},
            **modes(config),
            "n_on": len(records.on),
            "n_off": len(records.off),
            "n_random_trials": config.eval.n_random_trials,
            "sources": sources,
            "gates": [{**asdict(check), "verdict": check.verdict} for check in results.checks],
            "numerical_floor": results.floor,
            "metrics": results.metrics,
            "comparisons": results.comparisons,
            "seconds": seconds,
            "runtime": runtime,
            "config": config.model_dump(),
        },
    )
    artifacts = folder / "artifacts"
    write_json(
        artifacts / "phase2_selection.json",
        {
            "run_id": run_id,
            **modes(config),
            "prefix_len": config.prefix_len,
            "bos_token_id": bos,
            "injection_layers": config.layer_scope.injection,
        },
        {
            "on": map(_without_type, records.selections),
            "off": ({key: record[key] for key in _OFF_KEYS} for record in records.off),
        },
    )
    write_json(
        artifacts / "phase2_prefix_meta.json",
        {
            "run_id": run_id,
            **modes(config),
            "prefix_len": config.prefix_len,
            "injection_layers": config.layer_scope.injection,
        },
        {
            "prefixes": (
                {
                    "sample_id": record["sample_id"],
                    "slots": record["prefix_slots"],
                    "kept": len(record["kept_tokens"]),
                    "null": record["prefix_slots"] - len(record["kept_tokens"]),
                    "key_positions": record["key_positions"],
                    "query_start": record["query_start"],
                    "demo_tokens": len(record["demo_token_ids"]),
                }
                for record in records.selections
            )
        },
    )
    write_json(
        artifacts / "phase2_plumbing.json",
        {"run_id": run_id},
        {"plumbing": map(_without_type, records.plumbing), "repro": map(_without_type, records.repro)},
    )


def verdict_word(value: bool) -> str:
    """``pass`` or ``fail``."""
    return "pass" if value else "fail"


def _has_bos(records: Records) -> bool:
    return bool(records.selections) and records.selections[0]["token_kinds"][0] == "bos"


def _without_type(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "type"}
