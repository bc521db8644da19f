"""What a finished run leaves: files in its folder, and in its manifest what MLflow holds of it.

Each condition's records are read once and fan out to artifacts, tables and page. All of it comes from the run's folder, so
that ``render_again`` writes the same bytes without a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd

from cedkv.analysis.findings import ComparisonResult, compare_conditions
from cedkv.analysis.results import ConditionResult, collect, decide
from cedkv.conditions import Condition, factors, labels
from cedkv.config.resolve import resolve
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.files import append_lines, write_json, write_text
from cedkv.core.values import Record
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import token_text
from cedkv.report.artifacts import RUNTIME, SelectionFiles, TokenTexts, write_report
from cedkv.report.figures.captions import comparison_figures, run_figures
from cedkv.report.figures.plotting import save_png, to_svg
from cedkv.report.page.render import comparison_page, run_page
from cedkv.report.page.samples import ConditionSamples
from cedkv.report.summary import summary_markdown
from cedkv.report.tables import OnTable, conditions_table, off_table, off_tokens
from cedkv.report.text import aligned, console, console_note, markdown, run_name
from cedkv.runs import tracking
from cedkv.runs.journal import NAME as JOURNAL
from cedkv.runs.journal import Journal, read_journal
from cedkv.runs.lifecycle import ActiveRun
from cedkv.runs.manifest import TABLES, RunManifest, load_manifest
from cedkv.runs.progress import Clock
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.sample_notes import read_notes
from cedkv.runs.tags import condition_tags, shared_tags
from cedkv.tasks.load import Samples, Unusable


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


def publish_conditions(
    resolved: ResolvedRun,
    active: ActiveRun,
    manifests: Mapping[str, RunManifest],
    lm: LanguageModel,
    samples: Samples,
    journal: Journal,
    clock: Clock,
) -> list[ReportedCondition]:
    """Write and log every condition; a single evaluation is ended here, and its verdict printed.

    Args:
        manifests: condition key -> manifest of its run.
        journal: has the records of all conditions.
        clock: its times go into a single evaluation's report.
    """
    single = resolved.comparison is None
    sources, texts = {"on": samples.on_source, "off": samples.off_source}, TokenTexts({}, partial(token_text, lm.tokenizer))
    context = ReportContext(sources, lm.meta, texts, samples.notes, samples.unusable)
    reported = []
    for condition in _named(resolved.conditions, resolved.comparison, resolved.phase):
        manifest = manifests[condition.key]
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
    """A condition with its label and the settings that tell it from the others of its grid."""

    label: str
    factors: dict[str, object]


def _named(conditions: Sequence[Condition], comparison: str | None, phase: str) -> list[NamedCondition]:
    if comparison is None:
        return [NamedCondition(c.key, c.config, run_name(c.config, phase), {}) for c in conditions]
    names, differing = labels(conditions), factors(conditions)
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
    figures = {caption: to_svg(figure) for caption, figure in run_figures(collected, results).items()}
    write_text(folder / "report.html", run_page(result, shown, figures, context.sources, context.texts))
    save_table(manifest, "phase2_on_samples.json", on_table.frame())
    if collected.off:
        save_table(manifest, "phase2_off_samples.json", off_table(collected.off, context.texts))
    context.texts.save(folder, [*shown.tokens(), *off_tokens(collected.off)])
    return ReportedCondition(result, shown)


def _set_results(manifest: RunManifest, result: ConditionResult) -> None:
    """Set metrics, tags and description of a finished condition in its manifest."""
    metrics = {**result.results.metrics, **_seconds_metrics(manifest.seconds)}
    manifest.set_results(metrics, condition_tags(result), markdown(result))


def publish_comparison(
    name: str, active: ActiveRun, lm: LanguageModel, reported: Sequence[ReportedCondition], clock: Clock
) -> None:
    """Compare the conditions, write and log the parent run, end it, and print what came out."""
    manifest, results = active.manifest, [report.result for report in reported]
    comparison = compare_conditions(name, results)
    table = conditions_table(results)
    clock.enter("write")
    manifest.seconds = clock.read()
    texts = TokenTexts({}, partial(token_text, lm.tokenizer))
    report_comparison(manifest, comparison, table, reported, lm.meta, texts)
    best = comparison.best.condition
    tags = {"best": "none" if best is None else best.label, "best.rule": comparison.best.rule}
    tags |= {"best.run_id": "none" if best is None else best.run_id, "factors": ", ".join(results[0].factors)}
    for gate in ("gateA", "gateB"):
        tags[f"{gate}_passed"] = f"{sum(result.results.verdicts[gate] for result in results)} of {len(results)}"
    tags |= shared_tags(results)
    resolved_rows = sum(row["verdict"] != "not resolved" for row in comparison.comparisons)
    metrics = {**_seconds_metrics(manifest.seconds), "conditions": len(results), "comparisons_resolved": resolved_rows}
    manifest.set_results(metrics, tags, summary_markdown(comparison, limit=7900))
    click.echo(f"\n{aligned(results)}\n")
    for undecided in comparison.undecided:
        click.echo(f"note     {undecided}")
    for row in (*comparison.relations, *comparison.identical):
        if (note := console_note(row)) is not None:
            click.echo(note)
    click.echo(f"best     {tags['best']}\nrule     {comparison.best.rule}")
    click.echo(f"files    {manifest.folder}/report.html (and summary.md, comparison.json, figures/)")
    active.finish(manifest)
    if active.fault is None:
        click.echo(f"MLflow   {tracking.where_to_look(manifest)}")
        click.echo(f"compare  {tracking.compare_view(manifest, 'CHART')}")


def report_comparison(
    manifest: RunManifest,
    comparison: ComparisonResult,
    table: pd.DataFrame,
    reported: Sequence[ReportedCondition],
    runtime: Mapping[str, Any],
    texts: TokenTexts,
) -> None:
    """Write the parent run's files: ``comparison.json``, summary, tables, figures and page."""
    folder, best = manifest.folder, comparison.best.condition
    content = {
        "run_id": manifest.run_id,
        "comparison": comparison.name,
        "best": None if best is None else best.key,
        "best_rule": comparison.best.rule,
        "undecided": comparison.undecided,
        "conditions": table.to_dict("records"),
        "comparisons": comparison.comparisons,
        "questions": comparison.questions,
        "relations": comparison.relations,
        "equal_on_paper": comparison.identical,
        "seconds": manifest.seconds,
        "runtime": runtime,
        "config": resolve(folder / "config.yaml").model_dump(),
    }
    write_json(folder / "comparison.json", content)
    write_text(folder / "summary.md", summary_markdown(comparison))
    figures = comparison_figures(comparison)
    drawn = {caption: to_svg(figure) for caption, figure in figures.items()}
    write_text(folder / "report.html", comparison_page(comparison, [report.samples for report in reported], drawn, texts))
    (folder / "figures").mkdir(exist_ok=True)
    for number, figure in enumerate(figures.values(), 1):
        save_png(figure, folder / "figures" / f"{number:02d}_{figure.get_label()}.png")
    save_table(manifest, "conditions.json", table)
    save_table(manifest, "comparisons.json", pd.DataFrame(comparison.comparisons))
    texts.save(folder, [token for report in reported for token in report.samples.tokens()])


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
    if manifest.metrics_at is None:
        raise ConfigError(f"run {manifest.run_id} is not finished ({manifest.status}): --resume {manifest.run_id} first")
    manifests = {key: load_manifest(folder.parent / run_id) for key, run_id in manifest.children.items()} or {"run": manifest}
    conditions = [Condition(key, resolve(m.folder / "config.yaml")) for key, m in manifests.items()]
    name = manifest.command if manifest.children else None
    header, records_of = read_journal(folder / JOURNAL, list(manifests))
    sources = {kind: str(header[f"samples.{kind}.source"]) for kind in ("on", "off")}
    notes, unusable = read_notes(header)
    reported = []
    for condition in _named(conditions, name, manifest.phase):
        own = manifests[condition.key]
        context = ReportContext(sources, _read_runtime(own.folder), TokenTexts.load(own.folder), notes, unusable)
        reported.append(report_condition(own, condition, manifest.phase, records_of(condition.key), context))
        report_line(f"{own.folder}: rendered again")
    if name is not None:
        comparison = compare_conditions(name, [report.result for report in reported])
        table, first = conditions_table(comparison.conditions), next(iter(manifests.values()))
        runtime = _read_runtime(first.folder)
        report_comparison(manifest, comparison, table, reported, runtime, TokenTexts.load(folder))
        report_line(f"{folder}: rendered again")


def save_table(manifest: RunManifest, name: str, table: pd.DataFrame) -> None:
    """Write a table the way MLflow's UI reads it; it is logged at the run's root."""
    path = manifest.folder / TABLES / name
    path.parent.mkdir(exist_ok=True)
    table.to_json(path, orient="split", index=False, date_format="iso")


def _read_runtime(folder: Path) -> dict[str, Any]:
    path = folder / "artifacts" / RUNTIME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; it was damaged or removed") from None
    return {name: value for name, value in content.items() if name != "schema_version"}


def _seconds_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    return {f"seconds_{stage.replace(' ', '_')}": value for stage, value in seconds.items()}
