"""How fast a model went: tokens a second and times around the units, of a finished run or as the user gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cedkv.core.errors import ConfigError
from cedkv.core.text import plural, preview
from cedkv.report.artifacts import read_runtime
from cedkv.runs.manifest import MERGED_FROM, RunManifest, load_manifest
from cedkv.runs.outputs import outputs_folder
from cedkv.runs.progress import EVALUATE

STARTUP, END = ("start", "load"), ("report", "write")
"""Stages of a run's clock (``runs.progress``) that are not of its units."""


@dataclass(frozen=True)
class Rate:
    """How fast units went on one worker.

    tokens_per_second: tokens without padding, all that a unit does besides the model included.
    by_stage: seconds a token in each stage of the clock that was measured: the decoding and the single rows of Gate A take
        many times as long as the tokens of large passes.
    startup: seconds until the first unit; 0 where they are not known. end: seconds after the last one.
    source: the run that was measured; empty for a rate that was given.
    model, dtype, device: of that run; the device as the machine calls it.
    """

    tokens_per_second: float
    startup: float = 0.0
    end: float = 0.0
    source: str = ""
    model: str = ""
    dtype: str = ""
    device: str = ""
    by_stage: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, stages: Mapping[str, int]) -> float:
        """Return how long a unit takes with these tokens by stage; a stage that was not measured has the mean pace."""
        return sum(tokens * self.by_stage.get(stage, 1 / self.tokens_per_second) for stage, tokens in stages.items())


def run_folder(run: str) -> Path:
    """Return the folder that a user means by a folder, or by a run id of ``outputs/``."""
    folder = Path(run).absolute()
    return folder if folder.is_dir() else outputs_folder() / run


def timed_run(folder: Path) -> tuple[RunManifest, Mapping[str, float]]:
    """Return the manifest of a finished run, and the seconds of its stages.

    Raises:
        ConfigError: no run, a condition of a comparison, a run that is not finished, or one that was resumed, or computed by
            several workers.
    """
    manifest = load_manifest(folder)
    if manifest.parent is not None:
        raise ConfigError(
            f"{preview(str(folder), 200)} is a condition of comparison {manifest.parent}, whose units are timed as a whole: "
            f"--from {manifest.parent}"
        )
    if not manifest.seconds:
        raise ConfigError(
            f"run {manifest.run_id} has no times ({manifest.status}), so no rate can be taken from it: give a finished run, or "
            "--rate TOKENS_PER_SECOND"
        )
    if MERGED_FROM in manifest.tags:
        raise ConfigError(
            f"run {manifest.run_id} was merged, and its times are the sum over shards: give one of them "
            f"({manifest.tags[MERGED_FROM]})"
        )
    if EVALUATE in manifest.seconds:
        raise ConfigError(
            f"run {manifest.run_id} was computed by several workers at once (runtime.workers), so its times are of no single "
            "one: give a run of one process, or --rate TOKENS_PER_SECOND"
        )
    if manifest.earlier_units:
        raise ConfigError(
            f"run {manifest.run_id} was resumed: the times of {plural(manifest.earlier_units, 'unit')} before that are lost, "
            "so no rate can be taken from it: give a run that was not resumed, or --rate TOKENS_PER_SECOND"
        )
    return manifest, manifest.seconds


def rate_of(manifest: RunManifest, seconds: Mapping[str, float], stages: Mapping[str, int], model: str, dtype: str) -> Rate:
    """Return the rate of a run.

    Args:
        seconds: of ``timed_run``.
        stages: tokens that went through the model, by stage.

    Raises:
        ConfigError: the run is a shard without units.
        DataError: the run does not say on which device it ran.
    """
    if not stages:
        raise ConfigError(f"run {manifest.run_id} is shard {manifest.shard}, which has no units: give a shard that has some")
    startup, end = (sum(seconds.get(stage, 0.0) for stage in stages) for stages in (STARTUP, END))
    computing = sum(seconds.values()) - startup - end
    first = next(iter(manifest.children.values()), manifest.run_id)
    device = str(read_runtime(manifest.home / first)["device_name"])
    by_stage = {stage: seconds[stage] / tokens for stage, tokens in stages.items() if tokens and stage in seconds}
    return Rate(sum(stages.values()) / computing, startup, end, manifest.run_id, model, dtype, device, by_stage)
