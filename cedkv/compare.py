"""Comparisons: several conditions on the same samples in one run of the engine; a parent run with one nested run each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd

from cedkv import selectors, tracking
from cedkv.conditions import build, factors, label
from cedkv.config import Phase2Config
from cedkv.driver import OUTPUTS, Clock, datasets, evaluate, publish, token_text
from cedkv.eval_phase2 import Condition, evaluations, plan
from cedkv.lm import source
from cedkv.lm.capabilities import require
from cedkv.lm.scoring import next_token_logprobs
from cedkv.lm.source import LanguageModel
from cedkv.report.build import decide, sort_records, verdict_word, write_config
from cedkv.report.comparison import ConditionResult
from cedkv.report.drawing import save_png, to_svg
from cedkv.report.figures import comparison_figures
from cedkv.report.files import write_json, write_text
from cedkv.report.page import comparison_page
from cedkv.report.questions import questions, relations
from cedkv.report.summary import summary_markdown
from cedkv.report.text import number
from cedkv.samples.load import Samples, load_samples
from cedkv.stats_grid import best_condition, equal_on_paper, grid_comparisons
from cedkv.types import Record


def run_comparison(name: str, config: Phase2Config, lists: Mapping[str, str | None]) -> list[ConditionResult]:
    """Evaluate all conditions, compare them, and log parent and nested runs.

    Raises:
        CedkvError: as ``run_phase2``; parent and unfinished nested runs are then FAILED.
    """
    conditions = build(name, config, lists)
    title = f"{name} · {len(conditions)} conditions · seed {config.seed}"
    with tracking.tracked_run(title, {"comparison": name, "best": "pending"}) as run_id:
        folder = OUTPUTS / run_id
        children: dict[str, str] = {}
        try:
            return _run(name, config, conditions, run_id, folder, children)
        except BaseException:
            tracking.end_children(children.values())
            if folder.exists():
                tracking.log_partial(folder)
            raise


def _run(
    name: str,
    config: Phase2Config,
    conditions: Sequence[Condition],
    run_id: str,
    folder: Path,
    children: dict[str, str],
) -> list[ConditionResult]:
    clock = Clock()
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder)
    tracking.log_config(config)
    click.echo(f"run {run_id}: {name}, {len(conditions)} conditions; loading {config.model.id} ...", err=True)
    clock.enter("load")
    lm = source.load(config)
    for condition in conditions:
        require(lm.capabilities, condition.config)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions)
    inputs = datasets(samples, "2")
    tracking.log_datasets(inputs)
    _announce(lm, conditions, samples)
    pending = dict.fromkeys(("gateA", "gateB", "phase2"), "pending")
    for condition in conditions:
        children[condition.key] = tracking.create_child(label(condition, conditions[0]), pending)
        write_config(condition.config, OUTPUTS / children[condition.key])
    folders = {key: OUTPUTS / child for key, child in children.items()}
    found = evaluate(lm, conditions, samples, "2", folders, clock)
    clock.enter("report")
    results = _finish_children(lm, conditions, samples, children, found, inputs)
    _publish(name, lm, config, run_id, folder, results, clock)
    return results


def _finish_children(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    samples: Samples,
    children: Mapping[str, str],
    found: Mapping[str, list[Record]],
    inputs: Mapping[str, tuple[str, pd.DataFrame]],
) -> list[ConditionResult]:
    differing = factors(conditions)
    results = []
    for condition in conditions:
        key, config, child = condition.key, condition.config, children[condition.key]
        records = sort_records(found[key])
        decided = decide(config, records, "2")
        write_json(OUTPUTS / child / "artifacts" / "hf_runtime_meta.json", lm.meta)
        with tracking.child_run(child):
            tracking.log_config(config)
            tracking.log_datasets(inputs)
            publish(lm, config, samples, "2", child, OUTPUTS / child, records, decided, {})
        results.append(
            ConditionResult(
                key=key,
                label=label(condition, conditions[0]),
                run_id=child,
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
    run_id: str,
    folder: Path,
    results: list[ConditionResult],
    clock: Clock,
) -> None:
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
    tables = {"conditions.json": table, "comparisons.json": pd.DataFrame(compared)}
    tracking.log_comparison(tags, tables, summary[:7900], folder)
    click.echo(f"\n{table.drop(columns=['run_id']).to_string(index=False)}\n")
    click.echo(f"best     {tags['best']}\nrule     {rule}")
    click.echo(f"files    {folder}/report.html (and summary.md, comparison.json, figures/)")
    click.echo(f"MLflow   {tracking.where_to_look()}")


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
    rows = [s.teacher_ids for s in samples.on[:32]]
    since = time.perf_counter()
    next_token_logprobs(lm, rows, [s.sample_id for s in samples.on[:32]])
    speed = sum(map(len, rows)) / (time.perf_counter() - since)
    each = max(c.config.prefix_len for c in conditions) / 2 + sum(len(s.token_ids) for s in samples.off) / len(samples.off)
    minutes = total * each / speed / 60
    click.echo(
        f"{len(conditions)} conditions, {total} evaluations, about {minutes:.0f} minutes at {speed:.0f} tokens/s", err=True
    )
