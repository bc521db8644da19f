"""Merge shards: the one run of all their units, identical to an undivided run in the same units, made without a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import click

from cedkv.analysis.results import ConditionResult
from cedkv.checks.certificate import Certificate
from cedkv.conditions import Condition
from cedkv.config.resolve import resolve, with_values
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.files import write_json
from cedkv.core.text import plural
from cedkv.core.version import __version__
from cedkv.models.checkpoint import TRUST
from cedkv.report.artifacts import HEAD_WEIGHTS, TokenTexts
from cedkv.runs.devices import join_devices
from cedkv.runs.journal import as_lines, as_stored, differences, is_code
from cedkv.runs.lifecycle import open_run
from cedkv.runs.manifest import MERGED_FROM, new_manifest
from cedkv.runs.pipeline import attach_certificate, describe, opening_tags, publish, settings_of, write_samples
from cedkv.runs.progress import Clock
from cedkv.runs.resolved import ResolvedRun, conditions_of
from cedkv.runs.shard_runs import ShardRun, joined_runtime, read_shards
from cedkv.runs.tags import CODE


def merge(sources: Sequence[str]) -> list[ConditionResult]:
    """Make one run of all its shards, and log it; the shards remain as they are.

    Args:
        sources: a shard's folder, or the id of a run in ``outputs/``, each.

    Returns:
        A result per condition, in their order.

    Raises:
        ConfigError: the shards are not those of one run, or not all of them are there and finished; or they were computed with
            another version of cedkv or of an extension.
        DataError: a file of a shard is damaged.
        RunInterrupted, TrackingError: as ``runs.pipeline.run``.
    """
    shards = read_shards(sources)
    first = shards[0].manifest
    config = with_values(resolve(first.folder / "config.yaml"), {"runtime.shard": None})
    conditions = conditions_of(first.command, config, first.lists)
    _check_computed_here(shards[0], conditions)
    runtime, differing = joined_runtime(shards)
    configs = [condition.config for condition in conditions]
    tags = {name: value for each in shards for name, value in each.manifest.tags.items() if name in (TRUST, CODE)}
    certified, texts = _certificate(shards, configs), TokenTexts.load(*(each.manifest.folder for each in shards))
    manifest = new_manifest(first.command, first.phase, first.lists)
    manifest.tags[MERGED_FROM] = ", ".join(each.manifest.run_id for each in shards)
    manifest.earlier_units = len(shards[0].journal.planned)
    resolved = ResolvedRun(manifest, config, conditions, {})
    with open_run(resolved, opening_tags(resolved)) as active:
        units = plural(len(shards[0].journal.planned), "unit")
        click.echo(f"run {manifest.run_id}: merging {plural(len(shards), 'shard')}, {units}", err=True)
        for name, values in differing.items():
            click.echo(f"note: shards differ in {name}: {', '.join(map(str, values))}", err=True)
        clock = Clock(_seconds(shards))
        journal = active.open_journal(shards[0].header, [condition.key for condition in conditions])
        journal.copy([each.journal for each in shards])
        attach_certificate(certified, configs, manifest)
        if shards[0].head_weights is not None:
            write_json(active.folder / "artifacts" / HEAD_WEIGHTS, shards[0].head_weights)
        manifests = describe(resolved, active, shards[0].header, runtime, certified, first.datasets_by_task)
        for own in (manifest, *manifests.values()):
            own.tags |= tags
        write_samples({key: own.folder for key, own in manifests.items()}, journal)
        if config.runtime.mixed_devices:
            measured = [each.devices for each in shards if each.devices is not None]
            join_devices(journal, measured, certified.floor, [manifest, *active.children.values()])
        clock.enter("report")
        results = publish(resolved, active, manifests, shards[0].header, runtime, texts, journal, clock)
    click.echo(f"merged   from {plural(len(shards), 'shard')}; seconds by stage are the sum over them")
    return results


def _check_computed_here(shard: ShardRun, conditions: Sequence[Condition]) -> None:
    """Raise ConfigError, which names each difference, unless this version has the same settings and extensions."""
    here = {**settings_of(conditions, shard.manifest.phase), "versions.cedkv": __version__}
    current = {name: value for name, value in as_stored(here).items() if not is_code(name)}  # nothing is computed here
    stored = {name: value for name, value in shard.header.items() if name in current or "phase2." in name}
    changed = differences(stored, current, "in the shards", "here")
    if changed:
        raise ConfigError(
            f"{shard.name} and the others were computed by other versions than are here:{as_lines(changed)}\n"
            "Merge them with the versions of cedkv and of its extensions that computed them"
        )


def _certificate(shards: Sequence[ShardRun], configs: Sequence[Phase2Config]) -> Certificate:
    """Return the certificate of the first shard whose model is not certified for these configurations, else of the first."""
    return next((each.certificate for each in shards if each.certificate.failed(configs)), shards[0].certificate)


def _seconds(shards: Sequence[ShardRun]) -> dict[str, float]:
    """Return the wall time of all shards by stage."""
    total: dict[str, float] = defaultdict(float)
    for each in shards:
        for stage, seconds in each.manifest.seconds.items():
            total[stage] += seconds
    return total
