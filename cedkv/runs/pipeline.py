"""The pipeline of every run: load, evaluate, publish, log. A single evaluation is a grid of one, without a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from cedkv.analysis.results import ConditionResult
from cedkv.checks import certificate
from cedkv.checks.base import check_providers
from cedkv.conditions import Condition, by_task, in_task, labels
from cedkv.config.extensions import providers
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.files import append_lines, write_json, write_lines
from cedkv.core.text import plural, sanitize
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.inference.head_weights import HeadWeights, ensure_head_weights, use_head_weights
from cedkv.inference.passes import check_lengths, check_loaded_readings, check_readings
from cedkv.models import loading
from cedkv.models.capabilities import check_supported
from cedkv.models.checkpoint import trust_tag
from cedkv.models.context_window import check_context
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.report.artifacts import HEAD_WEIGHTS, RUNTIME
from cedkv.report.tables import sample_tables
from cedkv.report.text import about_samples, run_name
from cedkv.runs import tracking
from cedkv.runs.journal import Journal
from cedkv.runs.lifecycle import ActiveRun, open_run
from cedkv.runs.manifest import RunManifest, results_settings
from cedkv.runs.progress import Clock, Progress
from cedkv.runs.publish import publish_conditions
from cedkv.runs.publish_comparison import publish_comparison
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.sample_notes import notes_header
from cedkv.runs.tags import config_tags
from cedkv.selectors.base import query_kind, selector_class
from cedkv.tasks.load import Samples, load_samples
from cedkv.units import evaluations, plan_samples

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
    with open_run(resolved, tags) as active:
        return _run(resolved, active)


def _run(resolved: ResolvedRun, active: ActiveRun) -> list[ConditionResult]:
    clock, config, conditions = Clock(), resolved.config, resolved.conditions
    configs, keys = [condition.config for condition in conditions], [condition.key for condition in conditions]
    size = "" if resolved.comparison is None else f"{resolved.comparison}, {len(conditions)} conditions; "
    click.echo(f"run {active.manifest.run_id}: {size}loading {config.model.id} ...", err=True)
    clock.enter("load")
    spec = loading.open_spec(config)
    for each in configs:
        check_supported(spec.capabilities, each)
    check_readings(spec, configs)
    samples = {}
    for task, group in by_task(conditions).items():
        limits = (spec.capabilities.max_positions, spec.vocabulary)
        samples[task] = load_samples(group[0].config, spec.tokenizer, *limits, resolved.texts[task])
        for line in about_samples(samples[task].notes, samples[task].unusable, len(samples[task].on), len(samples[task].off)):
            click.echo(": ".join(filter(None, ("samples", task, sanitize(line)))), err=True)
        check_context(spec.capabilities, samples[task], [condition.config for condition in group])
        check_lengths(spec, [condition.config for condition in group], samples[task].on)
    lm = loading.load(config, spec)
    for each in configs:
        loading.check_loaded(lm, each)
    check_loaded_readings(lm, configs)
    identity = fingerprint(lm)
    journal = active.open_journal(depends_on(identity, conditions, samples, resolved.phase), keys)
    certified = certificate.ensure_certificate(lm, identity, config.model.cache_dir)
    _attach_certificate(certified, configs, active.manifest)
    certified.check(configs)
    weights_folder = certificate.measurements_folder(config.model.cache_dir, "head_weights")
    groups = [
        TaskGroup(
            task,
            group,
            samples[task],
            ensure_head_weights(lm, [condition.config for condition in group], certified.identity, weights_folder),
        )
        for task, group in by_task(conditions).items()
    ]
    if resolved.comparison is None:
        write_json(active.folder / "artifacts" / RUNTIME, lm.meta)
    if any(group.fitted for group in groups):
        all_fitted = [asdict(weights) for group in groups for weights in group.fitted]
        write_json(active.folder / "artifacts" / HEAD_WEIGHTS, {"fitted": all_fitted})
    datasets = {g.task: tracking.describe_datasets(sample_tables(g.samples, resolved.phase)) for g in groups}
    unique = {json.dumps(dataset): dataset for inputs in datasets.values() for dataset in inputs}
    active.manifest.datasets = list(unique.values())
    active.push()
    manifests = {keys[0]: active.manifest} if resolved.comparison is None else _children(resolved, active)
    for of_task in groups if resolved.comparison is not None else ():
        for condition in of_task.conditions:
            child = active.children[condition.key]
            child.datasets = datasets[of_task.task]
            write_json(child.folder / "artifacts" / RUNTIME, lm.meta)
            _attach_certificate(certified, [condition.config], child)
    evaluate(lm, groups, resolved.phase, {key: m.folder for key, m in manifests.items()}, clock, journal)
    clock.enter("report")
    samples_of = {condition.key: group.samples for group in groups for condition in group.conditions}
    reported = publish_conditions(resolved, active, manifests, lm, samples_of, journal, clock)
    if resolved.comparison is not None:
        publish_comparison(resolved.comparison, active, lm, reported, clock)
    return [report.result for report in reported]


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


def _attach_certificate(certified: certificate.Certificate, configs: Sequence[Phase2Config], manifest: RunManifest) -> None:
    """Tag a run with the certificate's verdict for its configurations, and store the certificate with it."""
    manifest.tags["certificate"] = "uncertified" if certified.failed(configs) else "certified"
    write_json(manifest.folder / "artifacts" / "certificate.json", certified.as_dict())


def depends_on(
    identity: Mapping[str, Any], conditions: Sequence[Condition], samples: Mapping[str, Samples], phase: Phase
) -> dict[str, Any]:
    """Return all that a run's records depend on, flat: a resumed run must agree in it.

    Args:
        identity: of ``fingerprint``.
        samples: of each task (``by_task``).
    """
    values: dict[str, Any] = {"phase": phase}
    for condition in conditions:
        prefix = "" if len(conditions) == 1 else f"{condition.key}: "
        settings = results_settings(condition.config)
        values |= {f"{prefix}{name}": value for name, value in settings.items()}
        values |= {f"{prefix}{name}": provider for name, provider in _providers(condition.config).items()}
    for task, of_task in samples.items():
        for kind, source, digested in (("on", of_task.on_source, of_task.on), ("off", of_task.off_source, of_task.off)):
            digest = sha256()
            for sample in digested:
                digest.update(f"{sample!r}\n".encode())
            name = in_task(task, f"samples.{kind}")
            values |= {f"{name}.source": source, f"{name}.digest": digest.hexdigest()}
        values |= notes_header(of_task, in_task(task, "samples"))
    return {**values, **check_providers(), **identity}


def _provenance(config: Phase2Config) -> dict[str, str]:
    """Return tags of code that is not this package's: a checkpoint's that runs, and what extensions provide."""
    return trust_tag(config.model) | _providers(config) | check_providers()


def _providers(config: Phase2Config) -> dict[str, str]:
    """Return who provides what this configuration names and is not built in; tags of the run too."""
    return providers({name.removeprefix("phase2."): value for name, value in config.dotted().items()})


@dataclass(frozen=True)
class TaskGroup:
    """The conditions of a task (``by_task``), their samples, and the weights of attention heads that they need."""

    task: str
    conditions: list[Condition]
    samples: Samples
    fitted: list[HeadWeights]


def evaluate(
    lm: LanguageModel,
    groups: Sequence[TaskGroup],
    phase: Phase,
    folders: Mapping[str, Path],
    clock: Clock,
    journal: Journal,
) -> None:
    """Run the units that are not in the journal; append each to the journal, and its samples to ``metrics.jsonl``."""
    plans = [plan_samples(group.conditions, group.samples, phase, group.task) for group in groups]
    units = [unit for plan in plans for unit in plan]
    done = len(journal.units)
    journal.require_plan([unit.key for unit in units])
    for key, folder in folders.items():
        write_lines(folder / "metrics.jsonl", _samples_of(journal.records(key)))
    if done:
        click.echo(f"resumed: {done} of {len(units)} units are done already", err=True)
    sizes = [
        evaluations(group.conditions, unit, phase, group.samples.on)
        for group, plan in zip(groups, plans, strict=True)
        for unit in plan
    ]
    if len(folders) > 1 and done < len(units):
        size = "; ".join(map(_size, groups))
        click.echo(f"{size}: {sum(sizes[done:]):,} evaluations (sample x arm) at most", err=True)
    with closing(Progress(sizes, done)) as progress:

        def step(arm: str, count: int) -> None:
            progress.step(arm, count)
            clock.enter(arm)

        before = 0  # units of the groups before this one
        for group, plan in zip(groups, plans, strict=True):
            use_head_weights(lm, [condition.config for condition in group.conditions], group.fitted)
            left = plan[max(0, done - before) :]
            before += len(plan)
            for unit, records in run_units(lm, group.conditions, group.samples, left, phase, step):
                journal.append(unit.key, records)
                for key, condition_records in records.items():
                    append_lines(folders[key] / "metrics.jsonl", _samples_of(condition_records))
                progress.unit(unit.key)


def _size(group: TaskGroup) -> str:
    """Return how many conditions are evaluated on how many samples, for the console."""
    n_on, n_off = len(group.samples.on), len(group.samples.off)
    size = f"{plural(len(group.conditions), 'condition')} on {n_on} ON samples and {n_off} OFF prompts"
    return f"{group.task}: {size}" if group.task else size


def _samples_of(records: Iterable[Record]) -> Iterator[Record]:
    return (record for record in records if record["type"] == "sample")
