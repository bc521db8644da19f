"""What a finished run leaves: files in its folder, and in its manifest what MLflow holds of it.

Each condition's records are read once and fan out to artifacts, tables and page. All of it comes from the run's folder, so
that ``render_again`` writes the same bytes without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import pandas as pd

from cedkv.analysis.results import ConditionResult, collect, decide
from cedkv.conditions import Condition, by_task, factors, in_task, labels, task_names
from cedkv.core.files import append_lines, write_text
from cedkv.core.values import Record
from cedkv.report.artifacts import SelectionFiles, TokenTexts, write_report
from cedkv.report.figures.captions import run_figures, save_main_figures
from cedkv.report.figures.plotting import to_svg
from cedkv.report.page.render import run_page
from cedkv.report.page.samples import ConditionSamples
from cedkv.report.tables import OnTable, off_table, off_tokens
from cedkv.report.text import console, markdown, run_name
from cedkv.runs import tracking
from cedkv.runs.journal import Journal
from cedkv.runs.lifecycle import ActiveRun
from cedkv.runs.manifest import TABLES, RunManifest
from cedkv.runs.progress import Clock
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.sample_notes import read_notes
from cedkv.runs.tags import condition_tags
from cedkv.tasks.load import Unusable


@dataclass(frozen=True)
class ReportedCondition:
    """A finished condition and what the page shows of its samples."""

    result: ConditionResult
    samples: ConditionSamples


@dataclass(frozen=True)
class ReportContext:
    """What a report says beside the records; all of it is stored in the run's folder.

    sources: where ON and OFF samples come from. runtime: model, device, versions. notes, unusable: of ``tasks.load.Samples``.
    """

    sources: Mapping[str, str]
    runtime: Mapping[str, Any]
    texts: TokenTexts
    notes: tuple[str, ...] = ()
    unusable: tuple[Unusable, ...] = ()


def context_of(header: Mapping[str, Any], task: str, runtime: Mapping[str, Any], texts: TokenTexts) -> ReportContext:
    """Return what the report of a task's condition says beside the records; ``header`` is the journal's."""
    sources = {kind: str(header[in_task(task, f"samples.{kind}") + ".source"]) for kind in ("on", "off")}
    return ReportContext(sources, runtime, texts, *read_notes(header, in_task(task, "samples")))


def publish_conditions(
    resolved: ResolvedRun,
    active: ActiveRun,
    manifests: Mapping[str, RunManifest],
    contexts: Mapping[str, ReportContext],
    journal: Journal,
    clock: Clock,
) -> list[ReportedCondition]:
    """Write and log every condition; a single evaluation is ended here, and its verdict printed.

    Args:
        manifests: condition key -> manifest of its run.
        contexts: task (``by_task``) -> what the reports of its conditions say beside the records.
        journal: has the records of all conditions.
        clock: its times go into a single evaluation's report.
    """
    single = resolved.comparison is None
    reported, task_of = [], task_names(resolved.conditions)
    for condition in named_conditions(resolved.conditions, resolved.comparison, resolved.phase):
        manifest, context = manifests[condition.key], contexts[task_of[condition.key]]
        manifest.seconds = clock.read() if single else {}
        report = report_condition(manifest, condition, resolved.phase, journal.records(condition.key), context)
        result = report.result
        line = {"type": "run", "run_id": manifest.run_id, "phase": resolved.phase, "metrics": result.results.metrics}
        append_lines(manifest.folder / "metrics.jsonl", [{**line, "seconds": manifest.seconds}])
        _set_results(manifest, result)
        if single:
            click.echo(console(result))
            click.echo(
                f"\nfiles    {manifest.folder}/report.html (and report_phase2.json, metrics.jsonl, config.yaml, artifacts/)"
            )
        active.finish(manifest)
        if single and active.fault is None:
            click.echo(f"MLflow   {tracking.where_to_look(manifest)}")
        reported.append(report)
    return reported


@dataclass(frozen=True)
class NamedCondition(Condition):
    """A condition with its label and the settings that tell it from the others of its task."""

    label: str
    factors: dict[str, object]


def named_conditions(conditions: Sequence[Condition], comparison: str | None, phase: str) -> list[NamedCondition]:
    """Return the conditions of a run with their names; ``comparison``: its name, None for a single evaluation."""
    if comparison is None:
        return [NamedCondition(c.key, c.config, run_name(c.config, phase), {}) for c in conditions]
    names = labels(conditions)
    differing = {key: settings for group in by_task(conditions).values() for key, settings in factors(group).items()}
    return [NamedCondition(c.key, c.config, names[c.key], differing[c.key]) for c in conditions]


def report_condition(
    manifest: RunManifest, condition: NamedCondition, phase: str, records: Iterable[Record], context: ReportContext
) -> ReportedCondition:
    """Read a condition's records once, decide, and write its artifacts, tables, figures and page."""
    folder, config = manifest.folder, condition.config
    on_table, shown = OnTable(), ConditionSamples()
    with SelectionFiles(folder, manifest.run_id, config) as selections:
        collected = collect(records, [selections, on_table, shown])
    results = decide(config, collected, phase)
    result = ConditionResult(
        condition.key,
        condition.label,
        manifest.run_id,
        config,
        collected,
        results,
        condition.factors,
        context.notes,
        context.unusable,
    )
    write_report(folder, result, context.sources, context.runtime, manifest.seconds)
    drawn = run_figures(collected, results)
    figures = {caption: to_svg(figure) for caption, figure in drawn.items()}
    write_text(folder / "report.html", run_page(result, shown, figures, context.sources, context.texts))
    save_main_figures(folder, drawn.values())
    save_table(manifest, "phase2_on_samples.json", on_table.frame())
    if collected.off:
        save_table(manifest, "phase2_off_samples.json", off_table(collected.off, context.texts))
    context.texts.save(folder, [*shown.tokens(), *off_tokens(collected.off)])
    return ReportedCondition(result, shown)


def _set_results(manifest: RunManifest, result: ConditionResult) -> None:
    """Set metrics, tags and description of a finished condition in its manifest."""
    metrics = {**result.results.metrics, **seconds_metrics(manifest.seconds)}
    manifest.set_results(metrics, condition_tags(result), markdown(result))


def save_table(manifest: RunManifest, name: str, table: pd.DataFrame) -> None:
    """Write a table the way MLflow's UI reads it; it is logged at the run's root."""
    path = manifest.folder / TABLES / name
    path.parent.mkdir(exist_ok=True)
    table.to_json(path, orient="split", index=False, date_format="iso")


def seconds_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return wall times by stage as metrics."""
    return {f"seconds_{stage.replace(' ', '_')}": value for stage, value in seconds.items()}
