"""Comparisons: several conditions on the same samples in one run of the engine; a parent run with one nested run each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
import pandas as pd

from cedkv import entry as entries
from cedkv import selectors, tracking
from cedkv.conditions import build, factors, label
from cedkv.config import Phase2Config
from cedkv.driver import Clock, datasets, depends_on, evaluate, publish, read_back, token_text
from cedkv.entry import Entry
from cedkv.eval_phase2 import Condition, evaluations, plan
from cedkv.job import Job, running, save_table
from cedkv.journal import Journal
from cedkv.lm import source
from cedkv.lm.capabilities import require
from cedkv.lm.scoring import next_token_logprobs
from cedkv.lm.source import LanguageModel
from cedkv.report.build import decide, verdict_word
from cedkv.report.comparison import ConditionResult
from cedkv.report.drawing import save_png, to_svg
from cedkv.report.figures import comparison_figures
from cedkv.report.files import write_json, write_text
from cedkv.report.page import comparison_page
from cedkv.report.questions import questions, relations
from cedkv.report.summary import summary_markdown
from cedkv.report.text import number
from cedkv.samples.jsonl import check_files
from cedkv.samples.load import Samples, load_samples
from cedkv.stats_grid import best_condition, equal_on_paper, grid_comparisons


def run_comparison(
    name: str, config: Phase2Config, lists: Mapping[str, str | None], entry: Entry | None = None, *, resumed: bool = False
) -> list[ConditionResult]:
    """Evaluate all conditions, compare them, and log parent and nested runs.

    Args:
        entry: the run, of ``entry.new`` or, to be ``resumed``, of ``entry.find``.

    Raises:
        CedkvError: as ``run_phase2``; parent and unfinished nested runs are then FAILED.
    """
    conditions = build(name, config, lists)
    check_files(config)
    entry = entry or entries.new(name, "2", config, lists)
    entry.name = entry.name or f"{name} · {len(conditions)} conditions · seed {config.seed}"
    with running(config, entry, {"comparison": name, "best": "pending"}, resumed) as job:
        return _run(name, config, conditions, job)


def _run(name: str, config: Phase2Config, conditions: Sequence[Condition], job: Job) -> list[ConditionResult]:
    clock = Clock()
    entry = job.entry
    click.echo(f"run {entry.run_id}: {name}, {len(conditions)} conditions; loading {config.model.id} ...", err=True)
    clock.enter("load")
    lm = source.load(config)
    for condition in conditions:
        require(lm.capabilities, condition.config)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions)
    journal = job.open_journal(depends_on(lm, conditions, samples, "2"), [condition.key for condition in conditions])
    entry.datasets = tracking.describe_datasets(datasets(samples, "2"))
    job.push()
    _announce(lm, conditions, samples)
    pending = dict.fromkeys(("gateA", "gateB", "phase2"), "pending")
    for condition in conditions:
        job.child(condition.key, label(condition, conditions[0]), condition.config, pending)
    folders = {key: child.folder for key, child in job.children.items()}
    evaluate(lm, conditions, samples, "2", folders, clock, journal)
    clock.enter("report")
    results = _finish_children(lm, conditions, samples, job, journal)
    _publish(name, lm, config, job, results, clock)
    return results


def _finish_children(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, job: Job, journal: Journal
) -> list[ConditionResult]:
    differing = factors(conditions)
    results = []
    for condition in conditions:
        key, config, child = condition.key, condition.config, job.children[condition.key]
        records = read_back(journal, key)
        decided = decide(config, records, "2")
        write_json(child.folder / "artifacts" / "hf_runtime_meta.json", lm.meta)
        child.datasets = job.entry.datasets
        publish(lm, config, samples, "2", child, journal, key, records, decided, {})
        job.finish(child)
        results.append(
            ConditionResult(
                key=key,
                label=label(condition, conditions[0]),
                run_id=child.run_id,
                config=config,
                factors=differing[key],
                oracle=selectors.is_oracle(config.select.mode),
                reference=selectors.reference(config.select.mode) is not None,
                records=records,
                results=decided,
            )
        )
    return results


def _publish(
    name: str,
    lm: LanguageModel,
    config: Phase2Config,
    job: Job,
    results: list[ConditionResult],
    clock: Clock,
) -> None:
    run_id, folder = job.entry.run_id, job.folder
    compared = grid_comparisons(results, config.seed)
    asked, known, equal = questions(results), relations(results), equal_on_paper(results)
    best, rule = best_condition(results)
    summary = summary_markdown(name, results, compared, asked, known, equal)
    figures = comparison_figures(results)
    table = conditions_table(results)
    clock.enter("write")
    content: dict[str, Any] = {
        "run_id": run_id, "comparison": name, "best": None if best is None else best.key, "best_rule": rule,
        "conditions": table.to_dict("records"), "comparisons": compared, "questions": asked, "relations": known,
        "equal_on_paper": equal, "seconds": clock.read(), "runtime": lm.meta, "config": config.model_dump(),
    }  # fmt: skip
    write_json(folder / "comparison.json", content)
    write_text(folder / "summary.md", summary)
    drawn = {caption: to_svg(figure) for caption, figure in figures.items()}
    write_text(folder / "report.html", comparison_page(name, results, compared, asked, drawn, token_text(lm)))
    (folder / "figures").mkdir(exist_ok=True)
    for at, figure in enumerate(figures.values(), 1):
        save_png(figure, folder / "figures" / f"{at:02d}.png")
    verdicts = {f"{check}_passed": str(sum(r.results.verdicts[check] for r in results)) for check in ("gateA", "gateB")}
    tags = {"best": "none" if best is None else best.label, "best.rule": rule, **verdicts}
    save_table(job.entry, "conditions.json", table)
    save_table(job.entry, "comparisons.json", pd.DataFrame(compared))
    job.entry.conclude({}, tags, summary[:7900])
    click.echo(f"\n{table.drop(columns=['run_id']).to_string(index=False)}\n")
    click.echo(f"best     {tags['best']}\nrule     {rule}")
    click.echo(f"files    {folder}/report.html (and summary.md, comparison.json, figures/)")
    job.finish(job.entry)
    if job.fault is None:
        click.echo(f"MLflow   {tracking.where_to_look(job.entry)}")


def conditions_table(results: Sequence[ConditionResult]) -> pd.DataFrame:
    """One row a condition: what it is, its main figures, its verdicts, its run."""
    rows = []
    for result in results:
        m = result.results.metrics
        kind = "oracle" if result.oracle else "reference" if result.reference else "candidate"
        rows.append(
            {
                "condition": result.label, "kind": kind,
                "acc_select": number(m["phase2_on_acc_student_select"]),
                "acc_random": number(m["phase2_on_acc_student_random_mean"]),
                "rel_kl_to_teacher": number(m["phase2_rel_kl_to_teacher_select"]),
                "off_delta_p99": number(m["phase2_off_delta_p99_select"]),
                "delta_on": number(m["phase2_delta_on_mean_select"]),
                **{gate: verdict_word(value) for gate, value in result.results.verdicts.items()},
                "run_id": result.run_id,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _announce(lm: LanguageModel, conditions: Sequence[Condition], samples: Samples) -> None:
    """Say how much there is to do, and about how long it takes: tokens, by the speed of one batch."""
    units = plan(conditions, len(samples.on), len(samples.off), "2")
    total = sum(evaluations(conditions, unit, "2") for unit in units)
    rows = [s.teacher_ids for s in samples.on[: lm.batch_size]]
    since = time.perf_counter()
    next_token_logprobs(lm, rows, [s.sample_id for s in samples.on[: lm.batch_size]])
    speed = sum(map(len, rows)) / (time.perf_counter() - since)
    each = max(c.config.prefix_len for c in conditions) / 2 + sum(len(s.token_ids) for s in samples.off) / len(samples.off)
    minutes = total * each / speed / 60
    click.echo(
        f"{len(conditions)} conditions, {total} evaluations, about {minutes:.0f} minutes at {speed:.0f} tokens/s", err=True
    )
