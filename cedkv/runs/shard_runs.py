"""Shards as they lie in their folders: found, and checked that together they are one whole run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from cedkv.checks.certificate import Certificate
from cedkv.config.options import COMPARISONS
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.shards import Shard
from cedkv.core.text import plural, preview
from cedkv.report.artifacts import CERTIFICATE, HEAD_WEIGHTS, read_artifact, read_runtime
from cedkv.runs.devices import DEVICES
from cedkv.runs.journal import NAME as JOURNAL
from cedkv.runs.journal import Journal, as_lines, differences, read_journal
from cedkv.runs.manifest import MERGED_FROM, SHARD_SETTING, RunManifest, is_run_id, load_manifest
from cedkv.runs.outputs import outputs_folder

OF_CERTIFICATE = ("runtime.matmul",)
"""What a certificate knows of a shard's results that the journal's header does not: which kernels multiply matrices."""


@dataclass(frozen=True)
class ShardRun:
    """A shard as it lies in its folder; only what is asked for is read."""

    manifest: RunManifest
    shard: Shard

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"shard {self.shard} (run {self.manifest.run_id})"

    @property
    def finished(self) -> bool:
        """Whether its run ended with all that a merge needs."""
        return self.manifest.status == "FINISHED" and self.manifest.metrics_at is not None

    @property
    def header(self) -> dict[str, Any]:
        """What its records depend on, as an undivided run would store it, but for its run id."""
        return self._stored[0]

    @property
    def journal(self) -> Journal:
        """Its finished units."""
        return self._stored[1]

    @cached_property
    def _stored(self) -> tuple[dict[str, Any], Journal]:
        path = self.manifest.folder / JOURNAL
        header, journal = read_journal(path, ())
        if header["run_id"] != self.manifest.run_id:
            raise DataError(f"{path} is the journal of run {preview(header['run_id'])}; put the one of this run in its place")
        plain = {name: value for name, value in header.items() if name not in ("schema_version", "run_id")}
        of_shard = [name for name in plain if name == SHARD_SETTING or name.endswith(f": {SHARD_SETTING}")]
        own = self.shard.of(journal.planned)
        if {plain[name] for name in of_shard} != {str(self.shard)} or not set(journal.ran_on) <= set(own):
            raise DataError(f"{path} is not the journal of shard {self.shard}: the file was replaced or edited")
        return plain | dict.fromkeys(of_shard), journal

    @cached_property
    def runtime(self) -> dict[str, Any]:
        """Model, device, versions."""
        return read_runtime(self.manifest.folder)

    @cached_property
    def certificate(self) -> Certificate:
        """The certificate of the model where the shard was computed."""
        content = read_artifact(self.manifest.folder, CERTIFICATE)
        try:
            return Certificate.from_dict(content)
        except (KeyError, TypeError) as error:
            path = self.manifest.folder / "artifacts" / CERTIFICATE
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}; it was damaged or edited") from None

    @cached_property
    def head_weights(self) -> dict[str, Any] | None:
        """The fitted weights of attention heads; None where no selector needs any."""
        return self._artifact(HEAD_WEIGHTS)

    @cached_property
    def devices(self) -> dict[str, Any] | None:
        """How far several kinds of device differ; None where one kind has computed the shard."""
        return self._artifact(DEVICES)

    def _artifact(self, name: str) -> dict[str, Any] | None:
        has_one = (self.manifest.folder / "artifacts" / name).exists()
        return read_artifact(self.manifest.folder, name) if has_one else None


def read_shards(sources: Sequence[str]) -> list[ShardRun]:
    """Return the shards of one run in their order; those that have no units may be left out.

    Args:
        sources: a shard's folder, or the id of a run in ``outputs/``, each.

    Raises:
        ConfigError: one of them is no shard, not finished, or there twice; or shards differ or are missing.
        DataError: a journal or another file of a shard is damaged.
    """
    shards = sorted((_find(source) for source in sources), key=lambda each: each.shard)
    _check_divided_alike(shards)
    finished = [each for each in shards if each.finished]
    for other in finished[1:]:
        _check_same(finished[0], other)
    problems = [line for each in shards for line in _unfinished(each)] + _missing(shards)
    if problems:
        raise ConfigError("the run is not complete:\n  " + "\n  ".join(problems))
    return shards


def _find(source: str) -> ShardRun:
    if os.path.isdir(source):  # unlike Path.is_dir, False for a name no folder can have
        folder = Path(os.path.abspath(source))  # the folder's name, also of ".", is the run id
    elif is_run_id(source):
        folder = outputs_folder() / source
    else:
        raise ConfigError(
            f"{preview(source, 200)} is neither the folder of a run nor a run id; runs are in {outputs_folder()}/"
        )
    manifest = load_manifest(folder)
    shard = manifest.shard
    if manifest.parent is None and MERGED_FROM not in manifest.tags and shard is not None:
        return ShardRun(manifest, shard)
    if manifest.parent is not None:
        problem = f"is a condition of comparison {manifest.parent}"
    elif MERGED_FROM in manifest.tags:
        problem = f"was merged already, from {manifest.tags[MERGED_FROM]}"
    else:
        problem = "is a whole run, made without runtime.shard"
    raise ConfigError(f"{preview(source, 200)} is no shard: run {manifest.run_id} {problem}; leave it out")


def _check_divided_alike(shards: Sequence[ShardRun]) -> None:
    """Raise ConfigError unless all shards are of the same number, and each is there once."""
    for one, two in pairwise(shards):
        if one.shard.count != two.shard.count:
            raise ConfigError(
                f"{one.name} and {two.name} are of runs that were divided differently; give the shards of one run"
            )
        if one.manifest.run_id == two.manifest.run_id:
            raise ConfigError(f"{one.name} is given twice; give each run once")
        if one.shard == two.shard:
            raise ConfigError(
                f"shard {one.shard} was run twice, as {one.manifest.run_id} and as {two.manifest.run_id}; leave one of them out"
            )


def _check_same(one: ShardRun, two: ShardRun) -> None:
    """Raise ConfigError, which names each difference, if the results of two shards would be of two kinds."""
    changed = differences(_depends_on(one), _depends_on(two), f"in {one.shard}", f"in {two.shard}")
    if changed:
        raise ConfigError(
            f"{one.name} and {two.name} cannot be merged, because their results would be of two kinds:{as_lines(changed)}\n"
            "Give the shards of one run, or run one of the two again with what the other was run with"
        )
    if one.head_weights != two.head_weights:
        raise ConfigError(
            f"{one.name} and {two.name} cannot be merged, because their weights of attention heads ({HEAD_WEIGHTS}) were "
            "fitted apart and differ. Run one of the two again where it finds the weights of the other: set CEDKV_CERTIFICATES "
            "to a folder that all shards share"
        )


def _depends_on(shard: ShardRun) -> dict[str, Any]:
    """Return all that a shard's records depend on, flat."""
    certified = {name: shard.certificate.identity.get(name) for name in OF_CERTIFICATE}
    return {"command": shard.manifest.command, **shard.header, **certified}


def _unfinished(shard: ShardRun) -> list[str]:
    """Return what a shard lacks and how to go on with it, as a line of a message; none of a finished shard."""
    resume = f"python -m cedkv --resume {shard.manifest.run_id}, where it was started"
    if not shard.finished:
        return [f"{shard.name} is not finished ({shard.manifest.status}): {resume}"]
    lost = len(shard.shard.of(shard.journal.planned)) - len(shard.journal.ran_on)
    return [f"{shard.name} was finished and lacks {plural(lost, 'unit')} in its journal: {resume}"] if lost else []


def _missing(shards: Sequence[ShardRun]) -> list[str]:
    """Return which shards are missing and how to run one, as a line of a message; those without units are not missed."""
    first, given = shards[0], {each.shard for each in shards}
    units = next((each.journal.planned for each in shards if each.finished), None)
    every = [Shard(i + 1, first.shard.count) for i in range(first.shard.count)]
    missing = [each for each in every if each not in given and (units is None or each.of(units))]
    if not missing:
        return []
    names = ", ".join(map(str, missing[:12])) + f" and {len(missing) - 12} more" * (len(missing) > 12)
    return [f"missing: {names}. Give the run of each; one that was not run yet, by: {_command(first.manifest, missing[0])}"]


def _command(manifest: RunManifest, shard: Shard) -> str:
    """Return the command that runs another shard of the same run."""
    config = ["--config", str(manifest.folder / "config.yaml"), "--shard", str(shard)]
    if manifest.command in COMPARISONS:
        lists = [word for name, value in manifest.lists.items() if value is not None for word in (f"--{name}", value)]
        return shlex.join(["python", "-m", "cedkv", manifest.command.replace("_", "-"), *lists, *config])
    return shlex.join(["python", "-m", "cedkv", "--phase", manifest.phase, *config])


def joined_runtime(shards: Sequence[ShardRun]) -> tuple[dict[str, Any], Mapping[str, list[Any]]]:
    """Return model, device and versions of a run of these shards, and what differs between them.

    What differs (the index of a card) is a list of all values, in the order of shards.
    """
    names = dict.fromkeys(name for each in shards for name in each.runtime)
    values = {name: [each.runtime.get(name) for each in shards] for name in names}
    distinct = {name: [value for i, value in enumerate(of) if value not in of[:i]] for name, of in values.items()}
    differing = {name: of for name, of in distinct.items() if len(of) > 1}
    return {name: of if len(of) > 1 else of[0] for name, of in distinct.items()}, differing
