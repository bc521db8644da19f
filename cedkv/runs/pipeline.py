"""The pipeline of every run: load, evaluate, publish, log. A single evaluation is a grid of one, without a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from cedkv.analysis.results import ConditionResult
from cedkv.checks.base import check_providers, check_sources
from cedkv.checks.certificate import Certificate
from cedkv.conditions import by_task, in_task, labels
from cedkv.config.extensions import providers, sources
from cedkv.config.schema import Phase2Config
from cedkv.core.files import append_lines, write_json, write_lines
from cedkv.core.text import plural
from cedkv.core.values import Record
from cedkv.execution.choice import choose_executor
from cedkv.execution.worker import Executor, ModelFacts
from cedkv.execution.workload import TaskGroup, Workload
from cedkv.models.checkpoint import trust_tag
from cedkv.models.fingerprint import DEVICE_KIND
from cedkv.models.opening import ModelSpec, open_spec
from cedkv.models.tokenizer import token_text
from cedkv.report.artifacts import HEAD_WEIGHTS, RUNTIME, TokenTexts
from cedkv.report.tables import sample_tables
from cedkv.report.text import run_name
from cedkv.runs import tracking
from cedkv.runs.devices import compare_devices
from cedkv.runs.journal import UNITS, Journal
from cedkv.runs.lifecycle import ActiveRun, open_run
from cedkv.runs.manifest import RunManifest, results_settings
from cedkv.runs.prepare import prepare
from cedkv.runs.progress import EVALUATE, Clock, Progress
from cedkv.runs.publish import publish_conditions
from cedkv.runs.publish_comparison import publish_comparison
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.sample_notes import notes_header
from cedkv.runs.tags import config_tags
from cedkv.selectors.base import query_kind, selector_class

PENDING = {"1.5": ("gateA",), "2": ("gateA", "gateB", "phase2")}
"""Tags of a phase's verdicts; ``pending`` until they are known."""


def run(resolved: ResolvedRun) -> list[ConditionResult]:
    """Evaluate and log a run, and compare its conditions where it is a comparison.

    Returns:
        A result per condition, in their order.

    Raises:
        CedkvError: model, samples, numbers, disk or tracking; the run, and nested runs that are not finished, are then FAILED
            and keep what they had.
    """
    config, manifest, name = resolved.config, resolved.manifest, resolved.comparison
    if name is None:
        manifest.name = manifest.name or run_name(config, resolved.phase)
        tags = dict.fromkeys(PENDING[resolved.phase], "pending")
    else:
        tasks = len(by_task(resolved.conditions))
        size = f"{tasks} tasks · " * (tasks > 1) + f"{len(resolved.conditions)} conditions"
        manifest.name = manifest.name or f"{name} · {size} · seed {config.seed}"
        tags = {"comparison": name, "best": "pending"}
    tags |= config_tags([condition.config for condition in resolved.conditions]) | _provenance(config)
    clock = Clock()
    clock.enter("load")
    spec = open_spec(config)  # before the run: a model that cannot be opened leaves none that failed
    with open_run(resolved, tags) as active:
        return _run(resolved, active, spec, clock)


def _run(resolved: ResolvedRun, active: ActiveRun, spec: ModelSpec, clock: Clock) -> list[ConditionResult]:
    config, conditions = resolved.config, resolved.conditions
    keys = [condition.key for condition in conditions]
    size = "" if resolved.comparison is None else f"{resolved.comparison}, {len(conditions)} conditions; "
    click.echo(f"run {active.manifest.run_id}: {size}loading {config.model.id} ...", err=True)
    work = prepare(resolved, spec)
    with closing(choose_executor(work, spec)) as executor:
        facts = executor.load()
        journal = active.open_journal(depends_on(facts.identity, work), keys)
        active.manifest.earlier_units = len(journal.ran_on)
        certified = executor.certify()
        _attach_certificate(certified, work.configs, active.manifest)
        certified.check(work.configs)
        fitted = [weights for of_group in executor.head_weights() for weights in of_group]
        if fitted:
            write_json(active.folder / "artifacts" / HEAD_WEIGHTS, {"fitted": [asdict(weights) for weights in fitted]})
        manifests = _describe(resolved, active, work, facts, certified)
        evaluate(executor, work, {key: m.folder for key, m in manifests.items()}, clock, journal)
        if config.runtime.mixed_devices:
            compare_devices(executor, work, journal, certified.floor, [active.manifest, *active.children.values()])
    clock.enter("report")
    samples_of = {condition.key: group.samples for group in work.groups for condition in group.conditions}
    texts = TokenTexts({}, partial(token_text, spec.tokenizer))
    reported = publish_conditions(resolved, active, manifests, facts.meta, texts, samples_of, journal, clock)
    if resolved.comparison is not None:
        publish_comparison(resolved.comparison, active, facts.meta, texts, reported, clock)
    return [report.result for report in reported]


def _describe(
    resolved: ResolvedRun, active: ActiveRun, work: Workload, facts: ModelFacts, certified: Certificate
) -> dict[str, RunManifest]:
    """Log model, datasets and certificate with the run and its nested runs; return the manifest of every condition's run."""
    datasets = {group.task: tracking.describe_datasets(sample_tables(group.samples, work.phase)) for group in work.groups}
    unique = {json.dumps(dataset): dataset for inputs in datasets.values() for dataset in inputs}
    active.manifest.datasets = list(unique.values())
    if resolved.comparison is None:
        write_json(active.folder / "artifacts" / RUNTIME, facts.meta)
        active.push()
        return {resolved.conditions[0].key: active.manifest}
    active.push()
    manifests = _children(resolved, active)
    for group in work.groups:
        for condition in group.conditions:
            child = manifests[condition.key]
            child.datasets = datasets[group.task]
            write_json(child.folder / "artifacts" / RUNTIME, facts.meta)
            _attach_certificate(certified, [condition.config], child)
    return manifests


def _children(resolved: ResolvedRun, active: ActiveRun) -> dict[str, RunManifest]:
    """Return the manifest of every condition's nested run."""
    label_of, pending = labels(resolved.conditions), dict.fromkeys(PENDING["2"], "pending")
    tasks = {condition.key: task for task, group in by_task(resolved.conditions).items() for condition in group}
    for condition in resolved.conditions:
        selector = selector_class(condition.config.select.mode)
        tags = {"comparison": str(resolved.comparison), "condition": condition.key}
        tags |= {"kind": selector.role, "query": query_kind(selector)}
        tags |= pending | config_tags([condition.config]) | _provenance(condition.config)
        name = " · ".join(filter(None, (tasks[condition.key], label_of[condition.key])))
        active.child(condition.key, name, condition.config, tags)
    return active.children


def _attach_certificate(certified: Certificate, configs: Sequence[Phase2Config], manifest: RunManifest) -> None:
    """Tag a run with the certificate's verdict for its configurations, and store the certificate with it."""
    manifest.tags["certificate"] = "uncertified" if certified.failed(configs) else "certified"
    write_json(manifest.folder / "artifacts" / "certificate.json", certified.as_dict())


def depends_on(identity: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """Return all that a run's records depend on, flat, and its units: a resumed run must agree in it.

    Args:
        identity: of ``fingerprint``; the kind of device is left out of it where ``runtime.mixed_devices`` is set.
    """
    if work.config.runtime.mixed_devices:
        identity = {name: value for name, value in identity.items() if name not in DEVICE_KIND}
    values: dict[str, Any] = {"phase": work.phase, UNITS: [planned.key for planned in work.plan]}
    conditions = work.conditions
    for condition in conditions:
        prefix = "" if len(conditions) == 1 else f"{condition.key}: "
        settings = results_settings(condition.config)
        values |= {f"{prefix}{name}": value for name, value in settings.items()}
        extensions = _providers(condition.config) | sources(_by_key(condition.config))
        values |= {f"{prefix}{name}": value for name, value in extensions.items()}
    for group in work.groups:
        task, samples = group.task, group.samples
        for kind, source, digested in (("on", samples.on_source, samples.on), ("off", samples.off_source, samples.off)):
            digest = sha256()
            for sample in digested:
                digest.update(f"{sample!r}\n".encode())
            name = in_task(task, f"samples.{kind}")
            values |= {f"{name}.source": source, f"{name}.digest": digest.hexdigest()}
        values |= notes_header(samples, in_task(task, "samples"))
    return {**values, **check_providers(), **check_sources(), **identity}


def _provenance(config: Phase2Config) -> dict[str, str]:
    """Return tags of code that is not this package's: a checkpoint's that runs, and what extensions provide."""
    return trust_tag(config.model) | _providers(config) | check_providers()


def _providers(config: Phase2Config) -> dict[str, str]:
    """Return who provides what this configuration names and is not built in; tags of the run too."""
    return providers(_by_key(config))


def _by_key(config: Phase2Config) -> dict[str, Any]:
    """Return a configuration's values by their keys."""
    return {name.removeprefix("phase2."): value for name, value in config.dotted().items()}


def evaluate(executor: Executor, work: Workload, folders: Mapping[str, Path], clock: Clock, journal: Journal) -> None:
    """Compute the units that are not in the journal; append each to the journal, and its samples to ``metrics.jsonl``."""
    left = [planned for planned in work.plan if planned.key not in journal.ran_on]
    done = [planned.size for planned in work.plan if planned.key in journal.ran_on]
    _write_samples(folders, journal)
    if done:
        click.echo(f"resumed: {len(done)} of {len(work.plan)} units are done already", err=True)
    if len(folders) > 1 and left:
        size, most = "; ".join(map(_size, work.groups)), sum(planned.size for planned in left)
        click.echo(f"{size}: {most:,} evaluations (sample x arm) at most", err=True)
    with closing(Progress({planned.key: planned.size for planned in left}, done)) as progress:

        def step(unit: str, arm: str, count: int) -> None:
            progress.step(unit, arm, count)
            clock.enter(arm if executor.at_once == 1 else EVALUATE)

        for finished in executor.execute(left, step):
            journal.append(finished.planned.key, finished.ran_on, finished.records)
            for key, records in finished.records.items():
                append_lines(folders[key] / "metrics.jsonl", _samples_of(records))
            progress.unit(finished.planned.key)
    if not journal.in_order:
        _write_samples(folders, journal)


def _write_samples(folders: Mapping[str, Path], journal: Journal) -> None:
    """Write the samples of finished units to ``metrics.jsonl``, in the order of the plan."""
    for key, folder in folders.items():
        write_lines(folder / "metrics.jsonl", _samples_of(journal.records(key)))


def _size(group: TaskGroup) -> str:
    """Return how many conditions are evaluated on how many samples, for the console."""
    n_on, n_off = len(group.samples.on), len(group.samples.off)
    size = f"{plural(len(group.conditions), 'condition')} on {n_on} ON samples and {n_off} OFF prompts"
    return f"{group.task}: {size}" if group.task else size


def _samples_of(records: Iterable[Record]) -> Iterator[Record]:
    return (record for record in records if record["type"] == "sample")
