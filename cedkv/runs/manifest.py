"""``run.json``: the description of a run and everything MLflow has to store of it, on disk before MLflow is called.

A run can be resumed, and logged later, from its folder alone. The module imports neither torch nor mlflow.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from cedkv.config.resolve import resolve, to_yaml
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, RunInterrupted
from cedkv.core.files import SCHEMA_VERSION, open_user_text, write_json, write_text
from cedkv.core.shards import Shard
from cedkv.core.text import preview, redact
from cedkv.runs.journal import differences, reject_changes
from cedkv.runs.outputs import outputs_folder, unwritable, write_remedy

NAME, TABLES = "run.json", "tables"
NOTE = "mlflow.note.content"
"""The tag that MLflow's UI shows as the description of a run."""
TAG_LENGTH, NAME_LENGTH = 8000, 250
"""Most characters of a tag in MLflow, the description included, and of the name of a run."""
INDIFFERENT = {
    "phase2.runtime.fail_on_gate",
    "phase2.runtime.mlflow_timeout",
    "phase2.runtime.system_metrics",
    "phase2.runtime.allow_other_code",
    "phase2.runtime.workers",
    "phase2.runtime.ray_address",
    "phase2.runtime.threads",
    "phase2.model.allow_uncertified",
}
"""Settings that change no result: they may differ when a run is resumed.

The number of torch threads does change roundings; what holds it is the journal, which has the number that computed.
"""
SHARD_SETTING = "phase2.runtime.shard"
MERGED_FROM = "merged_from"
"""The tag of a run that was merged from shards: their run ids."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class RunManifest:
    """A run, or a condition of a comparison (``parent`` is then the comparison's run id).

    run_id: name of the run's folder: MLflow's id, or ``local-...`` where MLflow could not be reached at the start.
    command: ``phase2``, a comparison's name, or ``condition``.
    lists: a comparison's list options, as the user gave them.
    children: condition key -> run id.
    origin: value of a tag by which the run is found in MLflow when the answer to "create a run" was lost.
    mlflow_run_id: the run's id in MLflow; None until MLflow has answered with one.
    experiment, experiment_id: MLflow's experiment, by name, by id, or both, which must then be of one; the id alone once
        MLflow has the run.
    start_time, end_time: in ms since 1970, as ``metrics_at``.
    metrics_at: when the metrics were computed: logging them again with the same time changes nothing.
    seconds: wall time by stage, of the process that finished the run. earlier_units: units that other processes had computed.
    datasets: MLflow's descriptions of the inputs, each with its ``context``.
    datasets_by_task: of a shard: those of each task (``conditions.by_task``).
    known: MLflow has confirmed that it has the run, and that the run is this one.
    logged: MLflow has everything.
    home: the folder that contains the run's folder; not stored.
    """

    command: str
    phase: str
    name: str = ""
    run_id: str = ""
    lists: dict[str, str | None] = field(default_factory=dict)
    parent: str | None = None
    children: dict[str, str] = field(default_factory=dict)
    origin: str = field(default_factory=lambda: f"local-{uuid4().hex}")
    mlflow_run_id: str | None = None
    experiment: str | None = "cedkv"
    experiment_id: str | None = None
    status: str = "RUNNING"
    start_time: int = field(default_factory=lambda: now())
    end_time: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_at: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    earlier_units: int = 0
    datasets: list[dict[str, str]] = field(default_factory=list)
    datasets_by_task: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    known: bool = False
    logged: bool = False
    home: Path = field(default_factory=outputs_folder)

    def __post_init__(self) -> None:
        self._from = max(self.start_time, self.end_time or 0), time.monotonic()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.home / self.run_id

    @property
    def shard(self) -> Shard | None:
        """Which part of a run this is; None for a whole run."""
        name = self.params.get(SHARD_SETTING, _param(None))
        return None if name == _param(None) else Shard.parse(name)

    @property
    def remedy(self) -> str:
        """What to do when the run was interrupted, as part of a message."""
        if MERGED_FROM in self.tags:
            return f"merge its shards again ({self.tags[MERGED_FROM]})"
        return f"continue with --resume {self.run_id}"

    def write(self, config: Phase2Config) -> None:
        """Write everything a resume needs: ``config.yaml`` and ``run.json``.

        Parameters are the resolved configuration under its dotted names (MLflow's limit: 6,000 characters per value).
        """
        write_config(config, self.folder)
        self.params = params(config)
        self.save()

    def save(self) -> None:
        """Write ``run.json``, without ``home``, so that the folder can be moved."""
        write_json(self.folder / NAME, {name: value for name, value in asdict(self).items() if name != "home"})

    def set_results(self, metrics: Mapping[str, float | None], tags: Mapping[str, str], description: str) -> None:
        """Set the results of a finished run; a metric that could not be computed is left out.

        Args:
            description: markdown; its links are files of the run (``tracking.ui_links``).
        """
        self.metrics = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self.metrics_at = self.timestamp()
        self.tags |= {name: redact(value)[:TAG_LENGTH] for name, value in {**tags, NOTE: description}.items()}

    def log_as_new(self, experiment: str) -> None:
        """Forget the run in MLflow: it is looked for by its origin, or created, in the experiment of this name."""
        self.mlflow_run_id, self.known = None, False
        self.experiment, self.experiment_id = experiment, None

    def finish(self, status: str) -> None:
        """Set the final status (FINISHED, FAILED or KILLED) and the end time; what MLflow has is then out of date."""
        self.status, self.end_time, self.logged = status, self.timestamp(), False

    def timestamp(self) -> int:
        """Return the time, in ms since 1970, of something that happens to the run now.

        It is no earlier than the run's start (of a resumed run: its end so far) and the time that has passed in this process
        since, whatever a clock that was set back says.
        """
        since, started = self._from
        return max(now(), since + int((time.monotonic() - started) * 1000))

    def not_before(self, start_time: int) -> None:
        """Begin no earlier than MLflow says that the run has begun (``mlflow run`` makes it before this process starts)."""
        self.start_time = max(self.start_time, start_time)
        self.end_time = None if self.end_time is None else max(self.end_time, self.start_time)
        self._from = max(self._from[0], self.start_time), self._from[1]


def params(config: Phase2Config) -> dict[str, str]:
    """Return a configuration as MLflow's parameters: dotted name -> text."""
    return {key: redact(_param(value))[:6000] for key, value in config.dotted().items()}


_MANIFEST = TypeAdapter(RunManifest)


def write_config(config: Phase2Config, folder: Path) -> None:
    """Write ``config.yaml``: the resolved configuration, from which the run can be repeated."""
    head = f"# schema_version: {SCHEMA_VERSION} (resolved configuration; run it again with -P config=this file)\n"
    write_text(folder / "config.yaml", head + to_yaml(config))


def new_manifest(command: str, phase: str, lists: Mapping[str, str | None]) -> RunManifest:
    """Return the manifest of a new run; nothing is written before MLflow has confirmed the run.

    ``MLFLOW_RUN_NAME`` is the user's name for the run; ``MLFLOW_RUN_ID`` is the run that ``mlflow run`` has created for it.

    Raises:
        ConfigError: ``MLFLOW_RUN_ID`` is not the id of a run, or names one that has results here.
    """
    name = redact(os.environ.get("MLFLOW_RUN_NAME", "")).strip()[:NAME_LENGTH]
    manifest = RunManifest(command, phase, name, lists=dict(lists))
    mlflow_run_id = os.environ.get("MLFLOW_RUN_ID")
    manifest.run_id = mlflow_run_id or manifest.origin
    if mlflow_run_id:
        if not is_run_id(mlflow_run_id):
            raise ConfigError(
                f"MLFLOW_RUN_ID = {preview(mlflow_run_id)} is not the id of a run; unset it, and a new run is made"
            )
        manifest.mlflow_run_id = mlflow_run_id
        if (manifest.folder / NAME).exists():
            raise ConfigError(
                f"MLFLOW_RUN_ID = {mlflow_run_id}: {manifest.folder} holds this run already, and results of two runs would be "
                f"mixed; resume={mlflow_run_id} continues it, and for a new run unset MLFLOW_RUN_ID (with mlflow run, leave "
                "--run-id out)"
            )
    return manifest


@contextmanager
def report_full_disk(manifest: RunManifest) -> Iterator[None]:
    """Turn an OSError that the run's files cannot be written into RunInterrupted with what is left and a remedy."""
    try:
        yield
    except OSError as error:
        subject = unwritable(error, manifest.folder)
        if subject is None:
            raise
        remedy = (
            f"Finished units are safe; {write_remedy(error)}, then {manifest.remedy}"
            if (manifest.folder / NAME).exists()
            else f"Nothing was computed yet; {write_remedy(error)}, then start again"
        )
        raise RunInterrupted(f"{preview(subject, 200)} cannot be written: {error}. {remedy}") from error


def now() -> int:
    """Return milliseconds since 1970."""
    return int(time.time() * 1000)


def load_manifest(folder: Path) -> RunManifest:
    """Return the manifest of a run's folder.

    Raises:
        ConfigError: there is no manifest, or it cannot be read.
    """
    path = folder / NAME
    try:
        with open_user_text(path) as file:
            manifest = _MANIFEST.validate_json(file.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}"
        raise ConfigError(f"{preview(str(path), 200)} cannot be read: {problem}; it was damaged or edited") from None
    except ValueError as error:
        if os.path.exists(path):  # unlike Path.exists, False for a name no file can have
            raise ConfigError(f"{preview(str(path), 200)} cannot be read: {error}; it was damaged or edited") from None
        state = "has no run.json: its run ended before anything was stored" if os.path.isdir(folder) else "does not exist"
        raise ConfigError(
            f"{preview(str(folder), 200)} {state}, so there is nothing to continue; start a new run, or check run id and "
            f"folder (runs are looked for in {outputs_folder().absolute()})"
        ) from None
    if manifest.run_id != folder.name:
        raise ConfigError(
            f"{preview(str(folder), 200)} holds run {preview(manifest.run_id)}; give the folder the name of its run"
        )
    for run_id in (manifest.run_id, *manifest.children.values()):
        check_run_id(run_id, str(path))
    manifest.home = folder.parent
    return manifest


def find_resumable(run_id: str) -> RunManifest:
    """Return the manifest of a run that is to be resumed.

    Raises:
        ConfigError: not a run id, no such run here, a condition of a comparison, or a run that was merged from shards.
    """
    manifest = load_manifest(outputs_folder() / check_run_id(run_id, "resume"))
    if manifest.parent is not None:
        raise ConfigError(
            f"run {run_id} is a condition of comparison {manifest.parent}: resume={manifest.parent} continues both"
        )
    if MERGED_FROM in manifest.tags:
        raise ConfigError(
            f"run {run_id} was merged from shards, which hold all its results: instead of resuming it, {manifest.remedy}"
        )
    return manifest


def check_run_id(run_id: str, source: str) -> str:
    """Return the text if it is a run id; raise ConfigError, which names the ``source`` of the text, if it is not."""
    if not is_run_id(run_id):
        raise ConfigError(
            f"{source} = {preview(run_id)} is not a run id; give the name of a folder in {outputs_folder()}/, like "
            "8da8f583e4b1..."
        )
    return run_id


def is_run_id(text: str) -> bool:
    """Return whether the text can name a run: not a path, and nothing a shell or an HTML page would interpret."""
    return _RUN_ID.fullmatch(text) is not None


def reject_other_config(manifest: RunManifest, config: Phase2Config) -> None:
    """Raise ConfigError, which names each difference, when a run was started with another configuration."""
    stored = resolve(manifest.folder / "config.yaml")
    reject_changes(manifest.run_id, differences(results_settings(stored), results_settings(config)))


def results_settings(config: Phase2Config) -> dict[str, Any]:
    """Return the settings that results depend on, by dotted name."""
    return {name: value for name, value in config.dotted().items() if name not in INDIFFERENT}


def _param(value: Any) -> str:
    """Return a value as the text of an MLflow parameter."""
    return value if isinstance(value, str) else json.dumps(value)
