"""One run from configuration to verdict: load, evaluate, decide, write, log. Only this file talks to all of them."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
import pandas as pd
from tqdm import tqdm

from cedkv import tracking
from cedkv.config import Phase2Config
from cedkv.eval_phase2 import Condition, Phase, evaluations, plan_samples, run
from cedkv.lm import source
from cedkv.lm.source import LanguageModel
from cedkv.report.build import Records, Results, decide, sort_records, verdict_word, write_config, write_results
from cedkv.report.drawing import to_svg
from cedkv.report.figures import run_figures
from cedkv.report.files import append_lines, write_json, write_text
from cedkv.report.page import run_page
from cedkv.report.tables import off_table, on_table
from cedkv.report.text import console, markdown, run_name
from cedkv.samples.load import Samples, load_samples
from cedkv.types import Record

OUTPUTS = Path("outputs")


class Clock:
    """Wall time by stage; a stage lasts until the next one begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = "start", time.perf_counter()

    def enter(self, stage: str) -> None:
        """Begin a stage; numbered ones (``random 2/5``, ``repeat 1: select``) count as one."""
        now = time.perf_counter()
        self.seconds[self._stage] += now - self._since
        self._stage, self._since = re.split(r" \d", stage)[0], now

    def read(self) -> dict[str, float]:
        """Seconds by stage, the running one included."""
        self.enter(self._stage)
        return {stage: round(value, 3) for stage, value in self.seconds.items()}


def run_phase2(config: Phase2Config, phase: Phase) -> Results:
    """Run and log one evaluation; phase 1.5 is Gate A alone, on ``eval.gate_a_samples`` ON samples.

    Raises:
        CedkvError: model, samples, numbers or tracking; the run is then FAILED and keeps what it had.
    """
    if phase == "1.5":
        sizes = config.eval.model_copy(update={"on_samples": min(config.eval.on_samples, config.eval.gate_a_samples)})
        config = config.model_copy(update={"eval": sizes})
    gates = ("gateA", "gateB", "phase2") if phase == "2" else ("gateA",)
    with tracking.tracked_run(run_name(config, phase), dict.fromkeys(gates, "pending")) as run_id:
        folder = OUTPUTS / run_id
        try:
            return _run(config, phase, run_id, folder)
        except BaseException:
            if folder.exists():
                tracking.log_partial(folder)
            raise


def _run(config: Phase2Config, phase: Phase, run_id: str, folder: Path) -> Results:
    clock = Clock()
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder)
    tracking.log_config(config)
    clock.enter("load")
    click.echo(f"run {run_id}: loading {config.model.id} ...", err=True)
    lm = source.load(config)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions)
    write_json(folder / "artifacts" / "hf_runtime_meta.json", lm.meta)
    tracking.log_datasets(datasets(samples, phase))
    found = evaluate(lm, [Condition("run", config)], samples, phase, {"run": folder}, clock)
    clock.enter("report")
    records = sort_records(found["run"])
    results = decide(config, records, phase)
    publish(lm, config, samples, phase, run_id, folder, records, results, clock.read())
    click.echo(console(config, results, len(records.on), len(records.off)))
    click.echo(f"\nfiles    {folder}/report.html (and report_phase2.json, metrics.jsonl, config.yaml, artifacts/)")
    click.echo(f"MLflow   {tracking.where_to_look()}")
    return results


def evaluate(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    samples: Samples,
    phase: Phase,
    folders: Mapping[str, Path],
    clock: Clock,
) -> dict[str, list[Record]]:
    """Run all units; sample records are in the conditions' folders as soon as their unit is done.

    Returns:
        The records of every condition, by its key.
    """
    units = plan_samples(conditions, samples, phase)
    total = sum(evaluations(conditions, unit, phase) for unit in units)
    found: dict[str, list[Record]] = {condition.key: [] for condition in conditions}
    shown = sys.stderr.isatty()
    with tqdm(total=total, unit="eval", desc="start", disable=None, dynamic_ncols=True) as bar:
        pending = 0

        def step(arm: str, count: int) -> None:
            nonlocal pending
            bar.update(pending)
            pending = count
            bar.set_description(arm)
            clock.enter(arm)

        for done, (unit, records) in enumerate(run(lm, conditions, samples, units, phase, step), 1):
            for key, new in records.items():
                append_lines(folders[key] / "metrics.jsonl", [record for record in new if record["type"] == "sample"])
                found[key] += new
            if not shown:
                click.echo(f"{unit.key} done ({done} of {len(units)} units)", err=True)
        bar.update(pending)
        bar.set_description("done")
    return found


def publish(
    lm: LanguageModel,
    config: Phase2Config,
    samples: Samples,
    phase: Phase,
    run_id: str,
    folder: Path,
    records: Records,
    results: Results,
    seconds: dict[str, float],
) -> None:
    """Write a finished run's files, then log them to the active MLflow run."""
    append_lines(
        folder / "metrics.jsonl",
        [{"type": "run", "run_id": run_id, "phase": phase, "metrics": results.metrics, "seconds": seconds}],
    )
    sources = {"on": samples.on_source, "off": samples.off_source}
    write_results(folder, run_id, config, records, results, sources, lm.meta, seconds)
    drawn = {caption: to_svg(figure) for caption, figure in run_figures(records, results).items()}
    write_text(folder / "report.html", run_page(config, records, results, drawn, sources, run_id, token_text(lm)))
    tables = {"phase2_on_samples.json": on_table(records.on, records.selections)}
    if records.off:
        tables["phase2_off_samples.json"] = off_table(records.off)
    tags = {name: verdict_word(value) for name, value in results.verdicts.items()}
    tags |= {f"gate{check.gate}.{check.name}": check.verdict for check in results.checks}
    times = {f"seconds_{stage.replace(' ', '_')}": value for stage, value in seconds.items()}
    description = markdown(config, results, len(records.on), len(records.off))
    tracking.log_results({**results.metrics, **times}, tags, tables, description, folder)


def token_text(lm: LanguageModel) -> Callable[[int], str]:
    """The text of one token."""
    return lambda token: str(lm.tokenizer.decode([token]))


def datasets(samples: Samples, phase: Phase) -> dict[str, tuple[str, pd.DataFrame]]:
    """The samples as MLflow dataset inputs: context -> (where from, table)."""
    on = pd.DataFrame(
        [
            {"sample_id": s.sample_id, "demo_text": s.episode.demo_text, "query_text": s.episode.query_text,
             "answer_text": s.episode.answer_text}
            for s in samples.on
        ]
    )  # fmt: skip
    found = {"on": (samples.on_source, on)}
    if phase == "2":
        off = pd.DataFrame([{"sample_id": s.sample_id, "prompt_text": s.prompt_text} for s in samples.off])
        found["off"] = (samples.off_source, off)
    return found
