"""Resolve what a run needs except the model: configuration, conditions and the user's sample files.

They are read here and nowhere else, so that invalid input is rejected before a run is created. The module imports neither torch
nor mlflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from cedkv.conditions import Condition, build_conditions, by_task
from cedkv.config.options import COMPARISONS, Phase
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.shards import Shard
from cedkv.runs.manifest import RunManifest, find_resumable, new_manifest
from cedkv.runs.request import RunRequest
from cedkv.tasks.from_rows import RowTask
from cedkv.tasks.texts import FileEpisodes, SampleTexts, read_sample_texts

_MADE = {
    "gold": "a shot or text that holds the answer (data.balance=true shows every label) for every row",
    "shots": "solved examples in the demonstration of every row",
    "other_query_text": "another question about the demonstration of every row",
}
"""What rows must have for an episode made of them to have a field."""


@dataclass(frozen=True)
class RunInputs:
    """The input of a run, read and validated; fields as those of ``ResolvedRun``.

    command: ``phase2`` or the name of a comparison.
    """

    command: str
    phase: Phase
    config: Phase2Config
    conditions: tuple[Condition, ...]
    texts: dict[str, SampleTexts]


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose input has been read and validated.

    config: settings that all conditions share are taken from this configuration.
    conditions: one for a single evaluation.
    texts: the samples of each task (``by_task``) as text.
    """

    manifest: RunManifest
    config: Phase2Config
    conditions: tuple[Condition, ...]
    texts: dict[str, SampleTexts]
    resumed: bool = False

    @property
    def phase(self) -> Phase:
        """The phase: 1.5 is Gate A alone, 2 is everything."""
        return "1.5" if self.manifest.phase == "1.5" else "2"

    @property
    def comparison(self) -> str | None:
        """The comparison's name; None for a single evaluation."""
        return self.manifest.command if self.manifest.command in COMPARISONS else None

    @property
    def shard(self) -> Shard | None:
        """Which part of the run's units is computed; None for all of them."""
        return self.config.shard


def resolve_request(request: RunRequest) -> ResolvedRun:
    """Read and validate the input of a new run, or of a run to resume.

    Raises:
        ConfigError: an invalid configuration or list, or a request that contradicts the run to resume.
        DataError: an invalid file of samples.
    """
    if request.resume is None:
        config = resolve(request.path, request.overrides, request.options)
        return resolve_run(request.command, config, request.phase or "2", request.lists)
    manifest = find_resumable(request.resume)
    _check_same(manifest.run_id, "command", manifest.command, request.command if request.command != "any" else None)
    _check_same(manifest.run_id, "phase", manifest.phase, request.phase)
    config = resolve(request.path or str(manifest.folder / "config.yaml"), request.overrides, request.options)
    phase: Phase = "1.5" if manifest.phase == "1.5" else "2"
    lists = request.lists if any(request.lists.values()) else manifest.lists
    return resolve_run(manifest.command, config, phase, lists, manifest)


def resolve_run(
    command: str,
    config: Phase2Config,
    phase: Phase = "2",
    lists: Mapping[str, str | None] | None = None,
    resumed: RunManifest | None = None,
) -> ResolvedRun:
    """Return a run of a configuration: a single evaluation, or a comparison.

    Args:
        command: ``phase2`` for a single evaluation, or the name of a comparison.
        lists: the comparison's list options, from which its conditions are built.
        resumed: the manifest of the run to resume; None for a new run.

    Raises:
        ConfigError, DataError: as ``resolve_request``.
    """
    inputs = resolve_inputs(command, config, phase, lists)
    manifest = resumed or new_manifest(command, phase, lists or {})
    return ResolvedRun(manifest, inputs.config, inputs.conditions, inputs.texts, resumed is not None)


def resolve_inputs(
    command: str, config: Phase2Config, phase: Phase = "2", lists: Mapping[str, str | None] | None = None
) -> RunInputs:
    """Read and validate the input of a run without making one; arguments and errors are those of ``resolve_run``."""
    config = config.for_phase(phase)
    _check_extras(config)
    conditions = conditions_of(command, config, lists or {})
    texts = {}
    for task, group in by_task(conditions).items():
        texts[task] = read_sample_texts(group[0].config)
        _check_evidence(group, texts[task])
    return RunInputs(command, phase, config, conditions, texts)


def conditions_of(command: str, config: Phase2Config, lists: Mapping[str, str | None]) -> tuple[Condition, ...]:
    """Return the conditions of a run; arguments and errors as ``resolve_run``."""
    return tuple(build_conditions(command, config, lists)) if command in COMPARISONS else (Condition("run", config),)


def _check_extras(config: Phase2Config) -> None:
    """Raise ConfigError if a run asks for what an extra brings that is not installed."""
    if config.runtime.workers is not None and find_spec("ray") is None:
        raise ConfigError(
            f"runtime.workers = {config.runtime.workers} needs Ray, which is not installed: pip install 'cedkv[ray]', or leave "
            "it null to compute in this process"
        )
    if config.runtime.system_metrics and find_spec("psutil") is None:
        raise ConfigError(
            "runtime.system_metrics = true needs psutil, which is not installed: pip install 'cedkv[system-metrics]', or leave "
            "it false"
        )


def _check_evidence(conditions: Sequence[Condition], texts: SampleTexts) -> None:
    """Raise DataError if a selector needs evidence that a sample of the user's file, or the task, does not give."""
    from cedkv.selectors.base import needed_of_episode  # imports numpy, which a bad configuration need not wait for

    reads: dict[str, set[str]] = {}
    for condition in conditions:
        reads.setdefault(condition.config.select.mode, set()).update(needed_of_episode(condition.config))
    config, task = conditions[0].config, texts.on
    for field in ("gold", "shots", "other_query_text"):
        needing = ", ".join(mode for mode, needed in reads.items() if field in needed)
        if needing and isinstance(task, FileEpisodes | RowTask):
            without = task.lacking(field, config.data, config.seed, config.eval.on_samples)
            if without is not None:
                has = f'"{field}" in every line' if isinstance(task, FileEpisodes) else _MADE[field]
                raise DataError(f"sample {without}: {needing} needs {has} of data.on_path; add it, or leave out what needs it")
        elif needing and field not in task.gives:
            raise DataError(
                f"{needing} needs {field}, which not every episode of data.task = {config.data.task} has; use another task or "
                "data.on_path, or leave out what needs it"
            )


def _check_same(run_id: str, name: str, stored: str, requested: str | None) -> None:
    """Raise ConfigError if a resume requests another command or phase than the run was started with."""
    if requested is not None and stored != requested:
        raise ConfigError(
            f"run {run_id} is of {name} {stored}, not {requested}: python -m cedkv --resume {run_id} continues any run"
        )
