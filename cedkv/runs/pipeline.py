"""The pipeline of every run: load, evaluate, publish, log. A single evaluation is a grid of one, without a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from cedkv.analysis.results import ConditionResult
from cedkv.checks.base import check_providers, check_sources
from cedkv.checks.certificate import Certificate
from cedkv.conditions import Condition, by_task, in_task, labels, task_names
from cedkv.config.extensions import providers, sources
from cedkv.config.schema import Phase2Config
from cedkv.core.files import append_lines, write_json, write_lines
from cedkv.core.text import plural
from cedkv.core.values import Record
from cedkv.execution.choice import choose_executor
from cedkv.execution.worker import Executor
from cedkv.execution.workload import TaskGroup, Workload
from cedkv.models.checkpoint import trust_tag
from cedkv.models.fingerprint import DEVICE_KIND
from cedkv.models.opening import ModelSpec, open_spec
from cedkv.models.tokenizer import token_text
from cedkv.report.artifacts import CERTIFICATE, HEAD_WEIGHTS, RUNTIME, TokenTexts
from cedkv.report.tables import sample_tables
from cedkv.report.text import run_name
from cedkv.runs import tracking
from cedkv.runs.devices import compare_devices
from cedkv.runs.journal import NAME, UNITS, Journal, stored_value
from cedkv.runs.lifecycle import ActiveRun, open_run
from cedkv.runs.manifest import RunManifest, results_settings
from cedkv.runs.prepare import prepare
from cedkv.runs.progress import EVALUATE, Clock, Progress
from cedkv.runs.publish import context_of, publish_conditions
from cedkv.runs.publish_comparison import publish_comparison
from cedkv.runs.publish_shard import publish_shard
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.sample_notes import notes_header
from cedkv.runs.tags import SHARD, config_tags
from cedkv.runs.unit_sizes import UNIT_SIZE, settle_sizes, size_params
from cedkv.selectors.base import query_kind, selector_class

PENDING = {"1.5": ("gateA",), "2": ("gateA", "gateB", "phase2")}
"""Tags of a phase's verdicts; ``pending`` until they are known."""


def run(resolved: ResolvedRun) -> list[ConditionResult]:
    """Evaluate and log a run, and compare its conditions where it is a comparison.

    Returns:
        A result per condition, in their order; none of a shard.

    Raises:
        CedkvError: model, samples, numbers, disk or tracking; the run, and nested runs that are not finished, are then FAILED
            and keep what they had.
    """
    clock = Clock()
    clock.enter("load")
    spec = open_spec(resolved.config)  # before the run: a model that cannot be opened leaves none that failed
    with open_run(resolved, opening_tags(resolved)) as active:
        return _run(resolved, active, spec, clock)


def opening_tags(resolved: ResolvedRun) -> dict[str, str]:
    """Return the tags of a run without results, and give it a name if it has none."""
    config, manifest, name, shard = resolved.config, resolved.manifest, resolved.comparison, resolved.shard
    if name is None:
        title = run_name(config, resolved.phase)
        tags = dict.fromkeys(PENDING[resolved.phase], "pending")
    else:
        tasks = len(by_task(resolved.conditions))
        size = f"{tasks} tasks · " * (tasks > 1) + f"{len(resolved.conditions)} conditions"
        title = f"{name} · {size} · seed {config.seed}"
        tags = {"comparison": name, "best": "pending"}
    if shard is not None:  # without a verdict
        title += f" · shard {shard}"
        tags = {tag: value for tag, value in tags.items() if value != "pending"} | {SHARD: str(shard)}
    manifest.name = manifest.name or title
    return tags | config_tags([condition.config for condition in resolved.conditions]) | _provenance(config)


def _run(resolved: ResolvedRun, active: ActiveRun, spec: ModelSpec, clock: Clock) -> list[ConditionResult]:
    config, conditions = resolved.config, resolved.conditions
    keys = [condition.key for condition in conditions]
    size = "" if resolved.comparison is None else f"{resolved.comparison}, {len(conditions)} conditions; "
    click.echo(f"run {active.manifest.run_id}: {size}loading {config.model.id} ...", err=True)
    work = prepare(resolved, spec)
    if resolved.resumed:
        work = _with_stored_threads(work, active.folder)
    with closing(choose_executor(work, spec)) as executor:
        facts = executor.load()
        work = settle_sizes(work, spec, facts.free_memory, active.folder)
        header = depends_on(facts.identity, work)
        journal = active.open_journal(header, keys)
        active.manifest.earlier_units = len(journal.ran_on)
        certified = executor.certify()
        attach_certificate(certified, work.configs, active.manifest)
        certified.check(work.configs)
        fitted = [weights for of_group in executor.head_weights() for weights in of_group]
        if fitted:
            write_json(active.folder / "artifacts" / HEAD_WEIGHTS, {"fitted": [asdict(weights) for weights in fitted]})
        datasets = {group.task: tracking.describe_datasets(sample_tables(group.samples, work.phase)) for group in work.groups}
        manifests = describe(resolved, active, header, facts.meta, certified, datasets)
        evaluate(executor, work, {key: m.folder for key, m in manifests.items()}, clock, journal)
        if config.runtime.mixed_devices:
            compare_devices(executor, work, journal, certified.floor, [active.manifest, *active.children.values()])
    clock.enter("report")
    texts = TokenTexts({}, partial(token_text, spec.tokenizer))
    if resolved.shard is not None:
        publish_shard(resolved, active, texts, journal, clock)
        return []
    return publish(resolved, active, manifests, header, facts.meta, texts, journal, clock)


def publish(
    resolved: ResolvedRun,
    active: ActiveRun,
    manifests: Mapping[str, RunManifest],
    header: Mapping[str, Any],
    runtime: Mapping[str, Any],
    texts: TokenTexts,
    journal: Journal,
    clock: Clock,
) -> list[ConditionResult]:
    """Write, log and end a run whose journal has all its units, and its nested runs.

    Args:
        manifests: of ``describe``.
        header: of ``depends_on``.
        runtime: model, device, versions.
    """
    contexts = {task: context_of(header, task, runtime, texts) for task in by_task(resolved.conditions)}
    reported = publish_conditions(resolved, active, manifests, contexts, journal, clock)
    if resolved.comparison is not None:
        publish_comparison(resolved.comparison, active, runtime, texts, reported, clock)
    return [report.result for report in reported]


def _with_stored_threads(work: Workload, folder: Path) -> Workload:
    """Return the workload of a resumed run with the torch threads that have computed it so far, unless it names a number."""
    stored = stored_value(folder / NAME, "runtime.torch_threads")
    if work.config.runtime.threads is not None or stored is None:
        return work
    runtime = work.config.runtime.model_copy(update={"threads": stored})
    return replace(work, config=work.config.model_copy(update={"runtime": runtime}))


def describe(
    resolved: ResolvedRun,
    active: ActiveRun,
    header: Mapping[str, Any],
    runtime: Mapping[str, Any],
    certified: Certificate,
    datasets: Mapping[str, list[dict[str, str]]],
) -> dict[str, RunManifest]:
    """Log model, datasets, certificate and sizes of units with a run and its nested runs, which a shard has none of.

    Args:
        header: of ``depends_on``.
        runtime: model, device, versions.
        datasets: task (``by_task``) -> MLflow's descriptions of its samples.

    Returns:
        The manifest of every condition's run, by the condition's key; none of a shard.
    """
    unique = {json.dumps(dataset): dataset for inputs in datasets.values() for dataset in inputs}
    active.manifest.datasets = list(unique.values())
    active.manifest.params |= size_params(header, by_task(resolved.conditions))
    if resolved.comparison is None or resolved.shard is not None:
        write_json(active.folder / "artifacts" / RUNTIME, runtime)
    if resolved.shard is not None:
        active.manifest.datasets_by_task = dict(datasets)
    active.push()
    if resolved.shard is not None:
        return {}
    if resolved.comparison is None:
        return {resolved.conditions[0].key: active.manifest}
    manifests, task_of = _children(resolved, active), task_names(resolved.conditions)
    for condition in resolved.conditions:
        child = manifests[condition.key]
        child.datasets = datasets[task_of[condition.key]]
        child.params |= size_params(header, [task_of[condition.key]])
        write_json(child.folder / "artifacts" / RUNTIME, runtime)
        attach_certificate(certified, [condition.config], child)
    return manifests


def _children(resolved: ResolvedRun, active: ActiveRun) -> dict[str, RunManifest]:
    """Return the manifest of every condition's nested run."""
    label_of, pending = labels(resolved.conditions), dict.fromkeys(PENDING["2"], "pending")
    tasks = task_names(resolved.conditions)
    for condition in resolved.conditions:
        selector = selector_class(condition.config.select.mode)
        tags = {"comparison": str(resolved.comparison), "condition": condition.key}
        tags |= {"kind": selector.role, "query": query_kind(selector)}
        tags |= pending | config_tags([condition.config]) | _provenance(condition.config)
        name = " · ".join(filter(None, (tasks[condition.key], label_of[condition.key])))
        active.child(condition.key, name, condition.config, tags)
    return active.children


def attach_certificate(certified: Certificate, configs: Sequence[Phase2Config], manifest: RunManifest) -> None:
    """Tag a run with the certificate's verdict for its configurations, and store the certificate with it."""
    manifest.tags["certificate"] = "uncertified" if certified.failed(configs) else "certified"
    write_json(manifest.folder / "artifacts" / CERTIFICATE, certified.as_dict())


def depends_on(identity: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """Return all that a run's records depend on, flat, and its units: a resumed run must agree in it.

    Args:
        identity: of ``fingerprint``; the kind of device is left out of it where ``runtime.mixed_devices`` is set.
    """
    if work.config.runtime.mixed_devices:
        identity = {name: value for name, value in identity.items() if name not in DEVICE_KIND}
    values = {**settings_of(work.conditions, work.phase), UNITS: [planned.key for planned in work.plan]}
    for group in work.groups:
        task, samples = group.task, group.samples
        values[in_task(task, UNIT_SIZE)] = group.unit_size
        for kind, source, digested in (("on", samples.on_source, samples.on), ("off", samples.off_source, samples.off)):
            digest = sha256()
            for sample in digested:
                digest.update(f"{sample!r}\n".encode())
            name = in_task(task, f"samples.{kind}")
            values |= {f"{name}.source": source, f"{name}.digest": digest.hexdigest()}
        values |= notes_header(samples, in_task(task, "samples"))
    return {**values, **identity}


def settings_of(conditions: Sequence[Condition], phase: str) -> dict[str, Any]:
    """Return what a run's records depend on that is known without model and samples, flat: settings, and code of extensions."""
    values: dict[str, Any] = {"phase": phase}
    for condition in conditions:
        prefix = "" if len(conditions) == 1 else f"{condition.key}: "
        settings = results_settings(condition.config)
        values |= {f"{prefix}{name}": value for name, value in settings.items()}
        extensions = providers(condition.config.by_key()) | sources(condition.config.by_key())
        values |= {f"{prefix}{name}": value for name, value in extensions.items()}
    return {**values, **check_providers(), **check_sources()}


def _provenance(config: Phase2Config) -> dict[str, str]:
    """Return tags of code that is not this package's: a checkpoint's that runs, and what extensions provide."""
    return trust_tag(config.model) | providers(config.by_key()) | check_providers()


def evaluate(executor: Executor, work: Workload, folders: Mapping[str, Path], clock: Clock, journal: Journal) -> None:
    """Compute the units that are not in the journal; append each to the journal, and its samples to ``metrics.jsonl``.

    Args:
        folders: condition key -> folder of its run; none of a shard, whose samples are in its journal alone.
    """
    left = [planned for planned in work.own if planned.key not in journal.ran_on]
    done = [planned.size for planned in work.own if planned.key in journal.ran_on]
    write_samples(folders, journal)
    if done:
        click.echo(f"resumed: {len(done)} of {len(work.own)} units are done already", err=True)
    if len(work.conditions) > 1 and left:
        size, most = "; ".join(map(_size, work.groups)), sum(planned.size for planned in left)
        click.echo(f"{size}: {most:,} evaluations (sample x arm) at most", err=True)
    with closing(Progress({planned.key: planned.size for planned in left}, done)) as progress:

        def step(unit: str, arm: str, count: int) -> None:
            progress.step(unit, arm, count)
            clock.enter(arm if executor.at_once == 1 else EVALUATE)

        for finished in executor.execute(left, step):
            journal.append(finished.planned.key, finished.ran_on, finished.records)
            for key in finished.records.keys() & folders.keys():
                append_lines(folders[key] / "metrics.jsonl", _samples_of(finished.records[key]))
            progress.unit(finished.planned.key)
    if not journal.in_order:
        write_samples(folders, journal)


def write_samples(folders: Mapping[str, Path], journal: Journal) -> None:
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
