"""One run from configuration to verdict: load, evaluate, decide, write, log. Only this file talks to all of them."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import pandas as pd

from cedkv.analysis.results import Records, Results, decide, verdict_word
from cedkv.checks import certificate
from cedkv.conditions import Condition
from cedkv.config.schema import Phase2Config
from cedkv.core.files import append_lines, write_json, write_lines, write_text
from cedkv.core.values import Record
from cedkv.eval_phase2 import Phase, evaluations, plan_samples, run
from cedkv.models import loading
from cedkv.models.checkpoint import trust_tag
from cedkv.models.context_window import check_context
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import token_text
from cedkv.report.artifacts import write_results
from cedkv.report.figures.captions import run_figures
from cedkv.report.figures.plotting import to_svg
from cedkv.report.page.render import run_page
from cedkv.report.page.samples import MAX_SAMPLES
from cedkv.report.tables import off_table, on_table
from cedkv.report.text import console, markdown, run_name
from cedkv.runs import manifest, tracking
from cedkv.runs.journal import Journal, StoredRecords
from cedkv.runs.lifecycle import ActiveRun, open_run, save_table
from cedkv.runs.manifest import RunManifest, decisive
from cedkv.runs.progress import Progress
from cedkv.tasks.load import Samples, load_samples


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


def run_phase2(config: Phase2Config, phase: Phase, entry: RunManifest | None = None, *, resumed: bool = False) -> Results:
    """Run and log one evaluation; phase 1.5 is Gate A alone, on ``eval.gate_a_samples`` ON samples.

    Args:
        entry: the run, of ``entry.new`` or, to be ``resumed``, of ``entry.find``.

    Raises:
        CedkvError: model, samples, numbers, disk or tracking; the run is then FAILED and keeps what it had.
    """
    config = config.for_phase(phase)
    entry = entry or manifest.new("phase2", phase, config, {})
    entry.name = entry.name or run_name(config, phase)
    gates = ("gateA", "gateB", "phase2") if phase == "2" else ("gateA",)
    with open_run(config, entry, dict.fromkeys(gates, "pending") | trust_tag(config.model), resumed) as job:
        return _run(config, phase, job)


def _run(config: Phase2Config, phase: Phase, job: ActiveRun) -> Results:
    clock = Clock()
    entry = job.entry
    click.echo(f"run {entry.run_id}: loading {config.model.id} ...", err=True)
    clock.enter("load")
    conditions = [Condition("run", config)]
    opened = loading.open_spec(config)
    samples = load_samples(config, opened.tokenizer, opened.capabilities.max_positions, opened.vocabulary)
    check_context(opened.capabilities, samples, [config])
    lm = loading.load(config, opened)
    prints = fingerprint(lm)
    journal = job.open_journal(depends_on(prints, conditions, samples, phase), ["run"])
    certified(lm, prints, [config], [entry])
    write_json(entry.folder / "artifacts" / "hf_runtime_meta.json", lm.meta)
    entry.datasets = tracking.describe_datasets(datasets(samples, phase))
    job.push()
    evaluate(lm, conditions, samples, phase, {"run": entry.folder}, clock, journal)
    clock.enter("report")
    records = read_back(journal, "run")
    results = decide(config, records, phase)
    publish(lm, config, samples, phase, entry, journal, "run", records, results, clock.read())
    click.echo(console(config, results, len(records.on), len(records.off)))
    click.echo(f"\nfiles    {entry.folder}/report.html (and report_phase2.json, metrics.jsonl, config.yaml, artifacts/)")
    job.finish(entry)
    if job.fault is None:
        click.echo(f"MLflow   {tracking.where_to_look(entry)}")
    return results


def certified(
    lm: LanguageModel, prints: Mapping[str, Any], configs: Sequence[Phase2Config], manifest: Sequence[RunManifest]
) -> None:
    """Certify the model, say so on every run, and refuse one that fails.

    Raises:
        ModelError: it fails, and ``model.allow_uncertified`` is not set.
    """
    found = certificate.ensure(lm, prints, configs[0].model.cache_dir)
    for entry in manifest:
        entry.tags["certificate"] = "uncertified" if found.failed(configs) else "certified"
        write_json(entry.folder / "artifacts" / "certificate.json", found.as_dict())
    found.require(configs)


def depends_on(prints: Mapping[str, Any], conditions: Sequence[Condition], samples: Samples, phase: Phase) -> dict[str, Any]:
    """All that a run's records depend on, flat: a resumed run must agree in it. ``prints``: of ``fingerprint``."""
    found: dict[str, Any] = {"phase": phase}
    for condition in conditions:
        where = "" if len(conditions) == 1 else f"{condition.key}: "
        found |= {f"{where}{name}": value for name, value in decisive(condition.config).items()}
    for kind, origin, its in (("on", samples.on_source, samples.on), ("off", samples.off_source, samples.off)):
        digest = sha256()
        for sample in its:
            digest.update(f"{sample!r}\n".encode())
        found |= {f"samples.{kind}.source": origin, f"samples.{kind}.digest": digest.hexdigest()}
    return {**found, **prints}


def evaluate(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    samples: Samples,
    phase: Phase,
    folders: Mapping[str, Path],
    clock: Clock,
    journal: Journal,
) -> None:
    """Run the units that are not in the journal yet; each is there, and its samples in ``metrics.jsonl``, when it is done."""
    units = plan_samples(conditions, samples, phase)
    done = len(journal.units)
    journal.require_plan([unit.key for unit in units])
    for condition in conditions:
        write_lines(folders[condition.key] / "metrics.jsonl", (r for r in journal.records(condition.key) if _is_sample(r)))
    if done:
        click.echo(f"resumed: {done} of {len(units)} units are done already", err=True)
    sizes = [evaluations(conditions, unit, phase) for unit in units]
    with closing(Progress(sizes, done)) as progress:

        def step(arm: str, count: int) -> None:
            progress.step(arm, count)
            clock.enter(arm)

        for unit, records in run(lm, conditions, samples, units[done:], phase, step):
            journal.append(unit.key, records)
            for key, new in records.items():
                append_lines(folders[key] / "metrics.jsonl", [record for record in new if _is_sample(record)])
            progress.unit(unit.key)


def read_back(journal: Journal, key: str) -> Records:
    """A condition's records: in memory what figures are computed from, on disk what only its files and the page show."""
    found: dict[str, list[Record]] = {"on": [], "off": [], "plumbing": [], "repro": []}
    selections = 0
    for record in journal.records(key):
        kind = record["kind"] if _is_sample(record) else record["type"]
        if kind == "selection":
            selections += 1
            continue
        if kind == "on" and len(found["on"]) >= MAX_SAMPLES:
            del record["topk"]
        found[kind].append(record)
    return Records(**found, selections=StoredRecords(journal, key, _is_selection, selections))


def publish(
    lm: LanguageModel,
    config: Phase2Config,
    samples: Samples,
    phase: Phase,
    entry: RunManifest,
    journal: Journal,
    key: str,
    records: Records,
    results: Results,
    seconds: dict[str, float],
) -> None:
    """Write a finished run's files, and what MLflow has to hold of it."""
    folder, run_id = entry.folder, entry.run_id
    append_lines(
        folder / "metrics.jsonl",
        [{"type": "run", "run_id": run_id, "phase": phase, "metrics": results.metrics, "seconds": seconds}],
    )
    sources = {"on": samples.on_source, "off": samples.off_source}
    write_results(folder, run_id, config, records, results, sources, lm.meta, seconds)
    drawn = {caption: to_svg(figure) for caption, figure in run_figures(records, results).items()}
    write_text(
        folder / "report.html", run_page(config, records, results, drawn, sources, run_id, partial(token_text, lm.tokenizer))
    )
    on = StoredRecords(journal, key, _is_on, len(records.on))
    save_table(entry, "phase2_on_samples.json", on_table(on, records.selections))
    if records.off:
        save_table(entry, "phase2_off_samples.json", off_table(records.off, partial(token_text, lm.tokenizer)))
    tags = {name: verdict_word(value) for name, value in results.verdicts.items()}
    tags |= {f"gate{check.gate}.{check.name}": check.verdict for check in results.checks}
    times = {f"seconds_{stage.replace(' ', '_')}": value for stage, value in seconds.items()}
    description = markdown(config, results, len(records.on), len(records.off))
    entry.set_results({**results.metrics, **times}, tags, description)


def _is_sample(record: Record) -> bool:
    return record["type"] == "sample"


def _is_on(record: Record) -> bool:
    return _is_sample(record) and record["kind"] == "on"


def _is_selection(record: Record) -> bool:
    return record["type"] == "selection"


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
