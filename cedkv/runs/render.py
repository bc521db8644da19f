"""Render a finished run again from its folder, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cedkv.conditions import Condition, task_names
from cedkv.config.resolve import resolve
from cedkv.core.errors import ConfigError
from cedkv.report.artifacts import TokenTexts, read_runtime
from cedkv.runs.journal import NAME as JOURNAL
from cedkv.runs.journal import read_journal
from cedkv.runs.manifest import load_manifest
from cedkv.runs.publish import context_of, named_conditions, report_condition
from cedkv.runs.publish_comparison import compare_tasks, report_comparison


def render_again(folder: Path, report_line: Callable[[str], None]) -> None:
    """Write a finished run's report again from its folder, without a model; the same version writes the same bytes.

    Raises:
        ConfigError: no folder of a run, a nested run of a comparison, or a run that is not finished.
        DataError: its journal is damaged, or it was stored by a version that did not keep all of this.
    """
    manifest = load_manifest(folder)
    if manifest.parent is not None:
        raise ConfigError(
            f"{str(folder)!r} is a condition of comparison {manifest.parent}: render the comparison, it renders its "
            "conditions too"
        )
    if manifest.shard is not None:
        raise ConfigError(
            f"run {manifest.run_id} is shard {manifest.shard}, a part of a run without a report of its own: python -m cedkv "
            "merge makes the run of all its shards"
        )
    if manifest.metrics_at is None:
        raise ConfigError(f"run {manifest.run_id} is not finished ({manifest.status}): --resume {manifest.run_id} first")
    manifests = {key: load_manifest(folder.parent / run_id) for key, run_id in manifest.children.items()} or {"run": manifest}
    conditions = [Condition(key, resolve(m.folder / "config.yaml")) for key, m in manifests.items()]
    name = manifest.command if manifest.children else None
    header, journal = read_journal(folder / JOURNAL, list(manifests))
    task_of = task_names(conditions)
    reported = []
    for condition in named_conditions(conditions, name, manifest.phase):
        own = manifests[condition.key]
        context = context_of(header, task_of[condition.key], read_runtime(own.folder), TokenTexts.load(own.folder))
        reported.append(report_condition(own, condition, manifest.phase, journal.records(condition.key), context))
        report_line(f"{own.folder}: rendered again")
    if name is not None:
        comparisons = compare_tasks(name, [report.result for report in reported])
        runtime = read_runtime(next(iter(manifests.values())).folder)
        report_comparison(manifest, comparisons, reported, runtime, TokenTexts.load(folder))
        report_line(f"{folder}: rendered again")
