"""Comparisons: several conditions on the same samples in one run of the engine; a parent run with one nested run each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import click
import pandas as pd
from tqdm import tqdm

from cedkv import selectors
from cedkv.analysis.comparison import best_condition, grid_comparisons, identical_conditions
from cedkv.analysis.findings import questions, relations
from cedkv.analysis.results import ConditionResult, decide
from cedkv.conditions import Condition, build, factors, labels
from cedkv.config.schema import Phase2Config
from cedkv.core.files import write_json, write_text
from cedkv.eval_phase2 import evaluations, plan_samples
from cedkv.models import loading
from cedkv.models.capabilities import check_supported
from cedkv.models.checkpoint import trust_tag
from cedkv.models.context_window import check_context
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import token_text
from cedkv.report.figures.captions import comparison_figures
from cedkv.report.figures.plotting import save_png, to_svg
from cedkv.report.page.render import comparison_page
from cedkv.report.summary import summary_markdown
from cedkv.report.tables import conditions_table
from cedkv.report.text import aligned, console_note
from cedkv.runs import manifest, tracking
from cedkv.runs.estimate import duration, teacher_tokens, tokens
from cedkv.runs.journal import Journal
from cedkv.runs.lifecycle import ActiveRun, open_run, save_table
from cedkv.runs.manifest import RunManifest
from cedkv.runs.pipeline import Clock, certified, datasets, depends_on, evaluate, publish, read_back
from cedkv.tasks.load import Samples, load_samples


def run_comparison(
    name: str, config: Phase2Config, lists: Mapping[str, str | None], entry: RunManifest | None = None, *, resumed: bool = False
) -> list[ConditionResult]:
    """Evaluate all conditions, compare them, and log parent and nested runs.

    Args:
        entry: the run, of ``entry.new`` or, to be ``resumed``, of ``entry.find``.

    Raises:
        CedkvError: as ``run_phase2``; parent and unfinished nested runs are then FAILED.
    """
    conditions = build(name, config, lists)
    entry = entry or manifest.new(name, "2", config, lists)
    entry.name = entry.name or f"{name} · {len(conditions)} conditions · seed {config.seed}"
    with open_run(config, entry, {"comparison": name, "best": "pending"} | trust_tag(config.model), resumed) as job:
        return _run(name, config, conditions, job)


def _run(name: str, config: Phase2Config, conditions: Sequence[Condition], job: ActiveRun) -> list[ConditionResult]:
    clock = _Estimating()
    entry = job.entry
    click.echo(f"run {entry.run_id}: {name}, {len(conditions)} conditions; loading {config.model.id} ...", err=True)
    clock.enter("load")
    opened, configs = loading.open_spec(config), [condition.config for condition in conditions]
    for each in configs:
        check_supported(opened.capabilities, each)
    samples = load_samples(config, opened.tokenizer, opened.capabilities.max_positions, opened.vocabulary)
    check_context(opened.capabilities, samples, configs)
    lm = loading.load(config, opened)
    for each in configs:
        loading.check_loaded(lm, each)
    prints = fingerprint(lm)
    journal = job.open_journal(depends_on(prints, conditions, samples, "2"), [condition.key for condition in conditions])
    certified(lm, prints, configs, [entry])
    entry.datasets = tracking.describe_datasets(datasets(samples, "2"))
    job.push()
    clock.expect(conditions, samples, done=len(journal.units))
    pending = dict.fromkeys(("gateA", "gateB", "phase2"), "pending")
    named = labels(conditions)
    for condition in conditions:
        tags = {"comparison": name, "condition": condition.key, "kind": selectors.kind(condition.config.select.mode)}
        job.child(condition.key, named[condition.key], condition.config, pending | tags | trust_tag(config.model))
    folders = {key: child.folder for key, child in job.children.items()}
    certified(lm, prints, configs, list(job.children.values()))
    evaluate(lm, conditions, samples, "2", folders, clock, journal)
    clock.enter("report")
    results = _finish_children(lm, conditions, samples, job, journal)
    _publish(name, lm, config, job, results, clock)
    return results


def _finish_children(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, job: ActiveRun, journal: Journal
) -> list[ConditionResult]:
    differing, named = factors(conditions), labels(conditions)
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
                label=named[condition.key],
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
    job: ActiveRun,
    results: list[ConditionResult],
    clock: Clock,
) -> None:
    run_id, folder = job.entry.run_id, job.folder
    compared = grid_comparisons(results, config.seed)
    asked, known, equal = questions(results), relations(results), identical_conditions(results)
    best, rule = best_condition(results)
    figures = comparison_figures(results)
    table = conditions_table(results)
    clock.enter("write")
    content: dict[str, Any] = {
        "run_id": run_id, "comparison": name, "best": None if best is None else best.key, "best_rule": rule,
        "conditions": table.to_dict("records"), "comparisons": compared, "questions": asked, "relations": known,
        "equal_on_paper": equal, "seconds": clock.read(), "runtime": lm.meta, "config": config.model_dump(),
    }  # fmt: skip
    write_json(folder / "comparison.json", content)
    write_text(folder / "summary.md", summary_markdown(name, results, compared, asked, known, equal))
    drawn = {caption: to_svg(figure) for caption, figure in figures.items()}
    page = comparison_page(name, results, compared, asked, known, equal, drawn, partial(token_text, lm.tokenizer))
    write_text(folder / "report.html", page)
    (folder / "figures").mkdir(exist_ok=True)
    for at, figure in enumerate(figures.values(), 1):
        save_png(figure, folder / "figures" / f"{at:02d}_{figure.get_label()}.png")
    passed = {gate: sum(r.results.verdicts[gate] for r in results) for gate in ("gateA", "gateB")}
    tags = {"best": "none" if best is None else best.label, "best.rule": rule}
    tags |= {"best.run_id": "none" if best is None else best.run_id, "factors": ", ".join(results[0].factors)}
    tags |= {f"{gate}_passed": f"{n} of {len(results)}" for gate, n in passed.items()}
    metrics = {f"seconds_{stage.replace(' ', '_')}": value for stage, value in content["seconds"].items()}
    metrics |= {"conditions": len(results), "comparisons_resolved": sum(c["verdict"] != "not resolved" for c in compared)}
    save_table(job.entry, "conditions.json", table)
    save_table(job.entry, "comparisons.json", pd.DataFrame(compared))
    job.entry.set_results(metrics, tags, summary_markdown(name, results, compared, asked, known, equal, limit=7900))
    click.echo(f"\n{aligned(table)}\n")
    for row in (*known, *equal):
        if (word := console_note(row)) is not None:
            click.echo(word)
    click.echo(f"best     {tags['best']}\nrule     {rule}")
    click.echo(f"files    {folder}/report.html (and summary.md, comparison.json, figures/)")
    job.finish(job.entry)
    if job.fault is None:
        click.echo(f"MLflow   {tracking.where_to_look(job.entry)}")
        click.echo(f"compare  {tracking.compare_view(job.entry, 'CHART')}")


class _Estimating(Clock):
    """A clock that says how long a grid will take, as soon as the teacher has read its first batch."""

    _expected: tuple[int, int] | None = None

    def expect(self, conditions: Sequence[Condition], samples: Samples, done: int) -> None:
        """Say how much there is to do after ``done`` units; the next stages are the first ones of that."""
        units = plan_samples(conditions, samples, "2")[done:]
        if not units:
            return
        total = tokens(conditions, units, samples)
        self._expected = total, teacher_tokens(units[0], samples)
        count = sum(evaluations(conditions, unit, "2") for unit in units)
        click.echo(
            f"{len(conditions)} conditions on {len(samples.on)} ON samples and {len(samples.off)} OFF prompts: {count} "
            f"evaluations, {total:,} tokens through the model",
            err=True,
        )

    def enter(self, stage: str) -> None:
        super().enter(stage)
        if self._expected and "teacher" in self.seconds:
            total, first = self._expected
            time = duration(total / first * self.seconds["teacher"])
            tqdm.write(f"about {time}, by the speed of the first batch", file=sys.stderr)
            self._expected = None
