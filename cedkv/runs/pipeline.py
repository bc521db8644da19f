"""The pipeline of every run: load, evaluate, publish, log. A single evaluation is a grid of one, without a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from cedkv.analysis.results import ConditionResult
from cedkv.checks import certificate
from cedkv.checks.base import check_providers
from cedkv.conditions import Condition, labels
from cedkv.config.extensions import providers
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.files import append_lines, write_json, write_lines
from cedkv.core.text import sanitize
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.inference.head_weights import ensure_head_weights
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
from cedkv.runs.publish import publish_comparison, publish_conditions
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.sample_notes import notes_header
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
        manifest.name = manifest.name or f"{name} · {len(resolved.conditions)} conditions · seed {config.seed}"
        tags = {"comparison": name, "best": "pending"}
    tags |= _provenance(config)
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
    samples = load_samples(config, spec.tokenizer, spec.capabilities.max_positions, spec.vocabulary, resolved.texts)
    for line in about_samples(samples.notes, samples.unusable, len(samples.on), len(samples.off)):
        click.echo(f"samples: {sanitize(line)}", err=True)
    check_context(spec.capabilities, samples, configs)
    check_lengths(spec, configs, samples.on)
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
    fitted = ensure_head_weights(lm, configs, certified.identity, weights_folder)
    if resolved.comparison is None:
        write_json(active.folder / "artifacts" / RUNTIME, lm.meta)
    if fitted:
        write_json(active.folder / "artifacts" / HEAD_WEIGHTS, {"fitted": [asdict(weights) for weights in fitted]})
    active.manifest.datasets = tracking.describe_datasets(sample_tables(samples, resolved.phase))
    active.push()
    manifests = {keys[0]: active.manifest} if resolved.comparison is None else _children(resolved, active)
    for condition in conditions if resolved.comparison is not None else ():
        child = active.children[condition.key]
        child.datasets = active.manifest.datasets
        write_json(child.folder / "artifacts" / RUNTIME, lm.meta)
        _attach_certificate(certified, [condition.config], child)
    evaluate(lm, conditions, samples, resolved.phase, {key: m.folder for key, m in manifests.items()}, clock, journal)
    clock.enter("report")
    reported = publish_conditions(resolved, active, manifests, lm, samples, journal, clock)
    if resolved.comparison is not None:
        publish_comparison(resolved.comparison, active, lm, reported, clock)
    return [report.result for report in reported]


def _children(resolved: ResolvedRun, active: ActiveRun) -> dict[str, RunManifest]:
    """Return the manifest of every condition's nested run."""
    names, pending = labels(resolved.conditions), dict.fromkeys(PENDING["2"], "pending")
    for condition in resolved.conditions:
        selector = selector_class(condition.config.select.mode)
        tags = {"comparison": str(resolved.comparison), "condition": condition.key}
        tags |= {"kind": selector.role, "query": query_kind(selector)}
        tags |= pending | _provenance(condition.config)
        active.child(condition.key, names[condition.key], condition.config, tags)
    return active.children


def _attach_certificate(certified: certificate.Certificate, configs: Sequence[Phase2Config], manifest: RunManifest) -> None:
    """Tag a run with the certificate's verdict for its configurations, and store the certificate with it."""
    manifest.tags["certificate"] = "uncertified" if certified.failed(configs) else "certified"
    write_json(manifest.folder / "artifacts" / "certificate.json", certified.as_dict())


def depends_on(identity: Mapping[str, Any], conditions: Sequence[Condition], samples: Samples, phase: Phase) -> dict[str, Any]:
    """Return all that a run's records depend on, flat: a resumed run must agree in it. ``identity``: of ``fingerprint``."""
    values: dict[str, Any] = {"phase": phase}
    for condition in conditions:
        prefix = "" if len(conditions) == 1 else f"{condition.key}: "
        settings = results_settings(condition.config)
        values |= {f"{prefix}{name}": value for name, value in settings.items()}
        values |= {f"{prefix}{name}": provider for name, provider in _providers(condition.config).items()}
    for kind, source, digested in (("on", samples.on_source, samples.on), ("off", samples.off_source, samples.off)):
        digest = sha256()
        for sample in digested:
            digest.update(f"{sample!r}\n".encode())
        values |= {f"samples.{kind}.source": source, f"samples.{kind}.digest": digest.hexdigest()}
    return {**values, **notes_header(samples), **check_providers(), **identity}


def _provenance(config: Phase2Config) -> dict[str, str]:
    """Return tags of code that is not this package's: a checkpoint's that runs, and what extensions provide."""
    return trust_tag(config.model) | _providers(config) | check_providers()


def _providers(config: Phase2Config) -> dict[str, str]:
    """Return who provides what this configuration names and is not built in; tags of the run too."""
    return providers({name.removeprefix("phase2."): value for name, value in config.dotted().items()})


def evaluate(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    samples: Samples,
    phase: Phase,
    folders: Mapping[str, Path],
    clock: Clock,
    journal: Journal,
) -> None:
    """Run the units that are not in the journal; append each to the journal, and its samples to ``metrics.jsonl``."""
    units = plan_samples(conditions, samples, phase)
    done = len(journal.units)
    journal.require_plan([unit.key for unit in units])
    for condition in conditions:
        write_lines(folders[condition.key] / "metrics.jsonl", _samples_of(journal.records(condition.key)))
    if done:
        click.echo(f"resumed: {done} of {len(units)} units are done already", err=True)
    sizes = [evaluations(conditions, unit, phase, samples.on) for unit in units]
    if len(conditions) > 1 and done < len(units):
        click.echo(
            f"{len(conditions)} conditions on {len(samples.on)} ON samples and {len(samples.off)} OFF prompts: "
            f"{sum(sizes[done:]):,} evaluations (sample x arm) at most",
            err=True,
        )
    with closing(Progress(sizes, done)) as progress:

        def step(arm: str, count: int) -> None:
            progress.step(arm, count)
            clock.enter(arm)

        for unit, records in run_units(lm, conditions, samples, units[done:], phase, step):
            journal.append(unit.key, records)
            for key, condition_records in records.items():
                append_lines(folders[key] / "metrics.jsonl", _samples_of(condition_records))
            progress.unit(unit.key)


def _samples_of(records: Iterable[Record]) -> Iterator[Record]:
    return (record for record in records if record["type"] == "sample")
