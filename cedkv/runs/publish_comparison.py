"""What a finished comparison leaves besides its conditions: the files of its parent run, of one task or of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click
import pandas as pd

from cedkv.analysis.best import Best
from cedkv.analysis.findings import ComparisonResult, compare_conditions
from cedkv.analysis.leaderboard import Leaderboard
from cedkv.analysis.ranking import entry_of, leaderboard
from cedkv.analysis.results import ConditionResult
from cedkv.conditions import TASK, by_task
from cedkv.config.resolve import resolve
from cedkv.core.files import write_json, write_text
from cedkv.report.artifacts import TokenTexts
from cedkv.report.figures.captions import comparison_figures, save_main_figures
from cedkv.report.figures.plotting import save_png, to_svg
from cedkv.report.leaderboard import console_matrix, frame
from cedkv.report.page.leaderboard import leaderboard_page
from cedkv.report.page.render import comparison_page
from cedkv.report.summary import summary_markdown, tasks_markdown
from cedkv.report.tables import conditions_table
from cedkv.report.text import aligned, console_note, describe_run, links
from cedkv.runs import tracking
from cedkv.runs.lifecycle import ActiveRun
from cedkv.runs.manifest import TAG_LENGTH, RunManifest
from cedkv.runs.progress import Clock
from cedkv.runs.publish import ReportedCondition, save_table, seconds_metrics
from cedkv.runs.tags import shared_tags
from cedkv.runs.ui import logged_length


def publish_comparison(
    name: str,
    active: ActiveRun,
    runtime: Mapping[str, Any],
    texts: TokenTexts,
    reported: Sequence[ReportedCondition],
    clock: Clock,
) -> None:
    """Compare the conditions, write and log the parent run, end it, and print what came out."""
    manifest = active.manifest
    comparisons = compare_tasks(name, [report.result for report in reported])
    clock.enter("write")
    manifest.seconds = clock.read()
    board = report_comparison(manifest, comparisons, reported, runtime, texts)
    _set_results(manifest, name, comparisons, board)
    for task, comparison in comparisons.items():
        click.echo(f"\n{task}" * bool(task) + f"\n{aligned(comparison.conditions)}\n")
        for undecided in comparison.undecided:
            click.echo(f"note     {undecided}")
        for row in (*comparison.relations, *comparison.identical):
            if (note := console_note(row)) is not None:
                click.echo(note)
        if board is not None:
            click.echo(f"best     {_label(comparison.best)}\nrule     {comparison.best.rule}")
    if board is not None:
        click.echo(f"\n{console_matrix(board)}\n")
    click.echo(f"best     {manifest.tags['best']}\nrule     {manifest.tags['best.rule']}")
    files = "summary.md, comparison.json, figures/" if board is None else "report_TASK.html, leaderboard.csv, summary.md"
    click.echo(f"files    {manifest.folder}/report.html (and {files})")
    active.finish(manifest)
    if active.fault is None:
        click.echo(f"MLflow   {tracking.where_to_look(manifest)}")
        click.echo(f"compare  {tracking.compare_view(manifest, 'CHART')}")


def compare_tasks(name: str, results: Sequence[ConditionResult]) -> dict[str, ComparisonResult]:
    """Return the comparison of the conditions of each task (``by_task``); statistics are paired, so never across tasks."""
    return {
        task: compare_conditions(f"{name}: {task}" if task else name, conditions)
        for task, conditions in by_task(results).items()
    }


def report_comparison(
    manifest: RunManifest,
    comparisons: Mapping[str, ComparisonResult],
    reported: Sequence[ReportedCondition],
    runtime: Mapping[str, Any],
    texts: TokenTexts,
) -> Leaderboard | None:
    """Write the parent run's files: ``comparison.json``, summary, tables, figures and page; of several tasks a page each too.

    Args:
        comparisons: of ``compare_tasks``.

    Returns:
        The methods ranked over the tasks; None where there is one task.
    """
    folder = manifest.folder
    shared = {"seconds": manifest.seconds, "runtime": runtime, "config": resolve(folder / "config.yaml").model_dump()}
    tables = {task: conditions_table(comparison.conditions) for task, comparison in comparisons.items()}
    contents = {task: _content(comparison, tables[task]) for task, comparison in comparisons.items()}
    if list(comparisons) == [""]:
        (comparison,) = comparisons.values()
        write_json(folder / "comparison.json", {"run_id": manifest.run_id, **contents[""], **shared})
        write_text(folder / "summary.md", summary_markdown(comparison))
        _write_page(manifest, comparison, reported, texts)
        save_table(manifest, "conditions.json", tables[""])
        save_table(manifest, "comparisons.json", pd.DataFrame(comparison.comparisons))
        texts.save(folder, [token for report in reported for token in report.samples.tokens()])
        return None
    board = task_leaderboard(comparisons)
    best = {"best": None if board.best is None else board.best.method, "best_rule": board.rule}
    of_tasks = [{"task": task, **content} for task, content in contents.items()]
    content = {"run_id": manifest.run_id, "comparison": manifest.command, **best, "tasks": of_tasks, **shared}
    write_json(folder / "comparison.json", content)
    write_text(folder / "summary.md", tasks_markdown(manifest.command, board, comparisons))
    pages = page_names(list(comparisons))
    samples_of = {id(report.result): report for report in reported}
    for task, comparison in comparisons.items():
        own = [samples_of[id(condition)] for condition in comparison.conditions]
        _write_page(manifest, comparison, own, texts, pages[task], f"{pages[task].removeprefix('report_')[:-5]}_")
    first = next(iter(comparisons.values())).conditions[0]
    size = describe_run(first.config, len(first.records.on), len(first.records.off))
    subtitle = f"{size} per task, {len(reported)} conditions on {len(comparisons)} tasks"
    write_text(folder / "report.html", leaderboard_page(board, manifest.command, subtitle, links=pages))
    table = frame(board)
    write_text(folder / "leaderboard.csv", table.to_csv(index=False))
    save_table(manifest, "leaderboard.json", table)
    save_table(manifest, "conditions.json", _with_task(tables))
    rows = {task: pd.DataFrame(comparison.comparisons) for task, comparison in comparisons.items()}
    save_table(manifest, "comparisons.json", _with_task(rows))
    texts.save(folder, [token for report in reported for token in report.samples.tokens()])
    return board


def task_leaderboard(comparisons: Mapping[str, ComparisonResult]) -> Leaderboard:
    """Return the methods of a grid ranked over its tasks."""
    conditions = [condition for comparison in comparisons.values() for condition in comparison.conditions]
    return leaderboard([entry_of(condition) for condition in conditions], conditions[0].config.seed)


def page_names(tasks: Sequence[str]) -> dict[str, str]:
    """Return the file name of each task's page: a task may be a reference ``package.module:Class``."""
    names: dict[str, str] = {}
    for task in tasks:
        name = stem = f"report_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}"
        number = 1
        while name in names.values():
            number += 1
            name = f"{stem}_{number}"
        names[task] = name
    return {task: f"{name}.html" for task, name in names.items()}


def _content(comparison: ComparisonResult, table: pd.DataFrame) -> dict[str, Any]:
    """Return what ``comparison.json`` says of one task."""
    best = comparison.best.condition
    return {
        "comparison": comparison.name,
        "best": None if best is None else best.key,
        "best_rule": comparison.best.rule,
        "undecided": comparison.undecided,
        "conditions": table.to_dict("records"),
        "comparisons": comparison.comparisons,
        "questions": comparison.questions,
        "relations": comparison.relations,
        "equal_on_paper": comparison.identical,
    }


def _write_page(
    manifest: RunManifest,
    comparison: ComparisonResult,
    reported: Sequence[ReportedCondition],
    texts: TokenTexts,
    page: str = "report.html",
    prefix: str = "",
) -> None:
    """Write the page and the figures of one task's comparison; ``prefix``: of the figures' names."""
    figures = comparison_figures(comparison)
    drawn = {caption: to_svg(figure) for caption, figure in figures.items()}
    write_text(manifest.folder / page, comparison_page(comparison, [report.samples for report in reported], drawn, texts))
    save_main_figures(manifest.folder, figures.values(), prefix)
    (manifest.folder / "figures").mkdir(exist_ok=True)
    for number, figure in enumerate(figures.values(), 1):
        save_png(figure, manifest.folder / "figures" / f"{prefix}{number:02d}_{figure.get_label()}.png")


def _with_task(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the tables of all tasks as one, with the task in its first column."""
    return pd.concat([table.assign(task=task)[["task", *table.columns]] for task, table in tables.items()], ignore_index=True)


def _set_results(
    manifest: RunManifest, name: str, comparisons: Mapping[str, ComparisonResult], board: Leaderboard | None
) -> None:
    """Set metrics, tags and description of a finished comparison in its manifest."""
    results = [condition for comparison in comparisons.values() for condition in comparison.conditions]
    factors = ", ".join(results[0].factors)
    files = {"page": "report.html", "conditions": "conditions.json", "comparisons": "comparisons.json", "summary": "summary.md"}
    if board is None:
        (comparison,) = comparisons.values()
        best = comparison.best
        tags = {"best": _label(best), "best.rule": best.rule, "best.run_id": _run_id(best), "factors": factors}
        head = _links(files)
        summary = summary_markdown(comparison, limit=TAG_LENGTH - logged_length(head))
    else:
        tags = {"best": "none" if board.best is None else board.best.method, "best.rule": board.rule}
        tags |= {"factors": ", ".join(filter(None, (TASK, factors))), "tasks": ", ".join(comparisons)}
        for task, comparison in comparisons.items():
            tags |= {f"best.{task}": _label(comparison.best), f"best.{task}.run_id": _run_id(comparison.best)}
        head = _links({**files, "leaderboard": "leaderboard.json"} | page_names(list(comparisons)))
        summary = tasks_markdown(name, board, comparisons, limit=TAG_LENGTH - logged_length(head))
    for gate in ("gateA", "gateB"):
        tags[f"{gate}_passed"] = f"{sum(result.results.verdicts[gate] for result in results)} of {len(results)}"
    tags |= shared_tags(results)
    rows = [row for comparison in comparisons.values() for row in comparison.comparisons]
    resolved_rows = sum(row["verdict"] != "not resolved" for row in rows)
    metrics = {**seconds_metrics(manifest.seconds), "conditions": len(results), "comparisons_resolved": resolved_rows}
    manifest.set_results(metrics, tags, head + summary.removeprefix(f"# {name}\n\n"))  # the UI shows the run's name above


def _links(files: Mapping[str, str]) -> str:
    """Return the first line of a comparison's description: links to its files, and to the UI's views of its nested runs."""
    return f"{links(files)} · nested runs: [charts](compare:CHART) · [tables](compare:ARTIFACT)\n\n"


def _label(best: Best) -> str:
    return "none" if best.condition is None else best.condition.label


def _run_id(best: Best) -> str:
    return "none" if best.condition is None else best.condition.run_id
