"""The JSON files of ``outputs/{run_id}/``: report, selection, prefixes, Gate A's observations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cedkv.analysis.results import Records, Results, verdict_word
from cedkv.config.schema import Phase2Config
from cedkv.core.files import write_json
from cedkv.core.values import Record

_OFF_KEYS = ("sample_id", "prompt_text", "token_ids", "state_of")


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


def _has_bos(records: Records) -> bool:
    return bool(records.selections) and records.selections[0]["token_kinds"][0] == "bos"


def _without_type(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "type"}
