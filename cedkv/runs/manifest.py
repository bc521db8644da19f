"""``run.json``: what a run is, and what MLflow has to hold of it. On disk before MLflow is asked for anything.

A run can be resumed, and logged later, from its folder alone. Light: it imports neither torch nor mlflow.
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
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from cedkv.config.resolve import resolve, to_yaml
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, RunInterrupted
from cedkv.core.files import SCHEMA_VERSION, open_user_text, write_json, write_text
from cedkv.core.text import preview, redact
from cedkv.runs.journal import differences, reject_changes

OUTPUTS = Path("outputs")
NAME, LOCK, TABLES, NOTE = "run.json", "run.lock", "tables", "mlflow.note.content"
INDIFFERENT = {"phase2.runtime.fail_on_gate", "phase2.runtime.mlflow_timeout", "phase2.model.allow_uncertified"}
"""Settings that change no result: a resumed run may have others."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class RunManifest:
    """A run, or a condition of a comparison (``parent`` is then the comparison's run id).

    run_id: name of the run's folder: MLflow's id, or ``local-...`` where MLflow could not be reached at the start.
    command: ``phase2``, a comparison's name, or ``condition``.
    lists: a comparison's list options, as they were given.
    children: condition key -> run id.
    origin: a tag by which MLflow finds the run again when its answer to "make a run" was lost.
    mlflow_run_id: None as long as MLflow is not known to have the run.
    experiment: MLflow's experiment, by name or (only digits) by id.
    metrics_at: when the metrics were computed, in ms: logging them again with the same time changes nothing.
    seconds: wall time by stage, of a finished run.
    datasets: MLflow's descriptions of the inputs, each with its ``context``.
    known: MLflow has confirmed that it has the run.
    logged: MLflow has everything.
    home: the folder its folder is in.
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
    experiment: str = "cedkv"
    status: str = "RUNNING"
    start_time: int = field(default_factory=lambda: now())
    end_time: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_at: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    datasets: list[dict[str, str]] = field(default_factory=list)
    known: bool = False
    logged: bool = False
    home: Path = OUTPUTS

    @property
    def folder(self) -> Path:
        return self.home / self.run_id

    def write(self, config: Phase2Config) -> None:
        """Write what a resume needs. The parameters are the resolved configuration, under its dotted names (MLflow's limit:
        6,000 characters)."""
        write_config(config, self.folder)
        self.params = {key: redact(_text(value))[:6000] for key, value in config.dotted().items()}
        self.save()

    def save(self) -> None:
        """Write ``run.json``; where the folder stands is not part of it, so that it can be moved."""
        write_json(self.folder / NAME, {name: value for name, value in asdict(self).items() if name != "home"})

    def set_results(self, metrics: Mapping[str, float | None], tags: Mapping[str, str], description: str) -> None:
        """Take a finished run's results (MLflow's limit for a description: 8,000 characters). What could not be computed is
        left out, not 0."""
        self.metrics = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self.metrics_at = now()
        self.tags |= {name: redact(value)[:8000] for name, value in {**tags, NOTE: description}.items()}

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED, now."""
        self.status, self.end_time, self.logged = status, now(), False


_ENTRY = TypeAdapter(RunManifest)


def write_config(config: Phase2Config, folder: Path) -> None:
    """``config.yaml``: the resolved configuration, ready to be run again."""
    head = f"# schema_version: {SCHEMA_VERSION} (resolved configuration; run it again with -P config=this file)\n"
    write_text(folder / "config.yaml", head + to_yaml(config))


def new_manifest(command: str, phase: str, config: Phase2Config, lists: Mapping[str, str | None]) -> RunManifest:
    """The manifest of a new run. One that ``mlflow run`` has made can be resumed from here on: its id is known already.

    Raises:
        ConfigError: ``MLFLOW_RUN_ID`` names a run that has results here.
        RunInterrupted: its folder cannot be written.
    """
    manifest = RunManifest(command, phase, lists=dict(lists))
    given = os.environ.get("MLFLOW_RUN_ID")
    manifest.run_id = checked(given, "MLFLOW_RUN_ID") if given else manifest.origin
    if given:
        manifest.mlflow_run_id = given
        if (manifest.folder / NAME).exists():
            raise ConfigError(
                f"{manifest.folder} holds a run already: resume={given} goes on with it; for a new run leave MLFLOW_RUN_ID and "
                "--run-id out"
            )
        with storing(manifest), locked(manifest.folder):
            manifest.write(config)
    return manifest


def require_outputs() -> None:
    """Raises RunInterrupted, before a run is made that would have no place, when ``outputs/`` cannot be written."""
    try:
        OUTPUTS.mkdir(exist_ok=True)
        with TemporaryFile(dir=OUTPUTS) as file:
            file.write(b"\0")
    except OSError as error:
        raise RunInterrupted(
            f"{OUTPUTS.absolute()} cannot be written: {error}; free space, or go to a folder of your own"
        ) from None


@contextmanager
def storing(manifest: RunManifest) -> Iterator[None]:
    """What is done in here writes to the run's folder. Raises RunInterrupted: it cannot; the message says what is left."""
    try:
        yield
    except OSError as error:
        then = (
            f"Finished units are safe in it; free space, then go on with --resume {manifest.run_id}"
            if (manifest.folder / NAME).exists()
            else "Nothing was done yet; free space, then start again"
        )
        raise RunInterrupted(f"{preview(str(manifest.folder), 200)} cannot be written: {error}. {then}") from error


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def load_manifest(folder: Path) -> RunManifest:
    """The manifest of a run's folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = folder / NAME
    try:
        with open_user_text(path) as file:
            manifest = _ENTRY.validate_json(file.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        why = f"{'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}"
        raise ConfigError(f"{preview(str(path), 200)} cannot be read: {why}; it was damaged or edited") from None
    except ValueError as error:
        if os.path.exists(path):  # unlike Path.exists, False for a name no file can have
            raise ConfigError(f"{preview(str(path), 200)} cannot be read: {error}; it was damaged or edited") from None
        there = "has no run.json: its run ended before anything was stored" if os.path.isdir(folder) else "is not there"
        raise ConfigError(
            f"{preview(str(folder), 200)} {there}, so there is nothing to go on with; start a new run, or check run id and "
            "folder (runs are looked for in outputs/ of the folder you are in)"
        ) from None
    if manifest.run_id != folder.name:
        raise ConfigError(
            f"{preview(str(folder), 200)} holds run {preview(manifest.run_id)}; give the folder the name of its run"
        )
    for run_id in (manifest.run_id, *manifest.children.values()):
        checked(run_id, str(path))
    manifest.home = folder.parent
    return manifest


def find_resumable(run_id: str) -> RunManifest:
    """The manifest of a run that is to be resumed. Raises ConfigError: no run id, or none of a run here."""
    manifest = load_manifest(OUTPUTS / checked(run_id, "resume"))
    if manifest.parent is not None:
        raise ConfigError(
            f"run {run_id} is a condition of comparison {manifest.parent}: resume={manifest.parent} continues both"
        )
    return manifest


def checked(run_id: str, name: str) -> str:
    """The text, if it is a run id and no path. Raises ConfigError."""
    if not is_run_id(run_id):
        raise ConfigError(
            f"{name} = {preview(run_id)} is no run id; give the name of a folder in outputs/, like 8da8f583e4b1..."
        )
    return run_id


def is_run_id(text: str) -> bool:
    """No path, and nothing that a shell or a page would read as more than a name."""
    return _RUN_ID.fullmatch(text) is not None


def reject_other_config(manifest: RunManifest, config: Phase2Config) -> None:
    """Raises ConfigError, naming each difference, when a run was started with another configuration."""
    path = manifest.folder / "config.yaml"
    reject_changes(manifest.run_id, differences(results_settings(resolve(path)), results_settings(config)))


def results_settings(config: Phase2Config) -> dict[str, Any]:
    """The settings that results depend on, by dotted name."""
    return {name: value for name, value in config.dotted().items() if name not in INDIFFERENT}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process alone; the system lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: another process has it.
        RunInterrupted: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"run {folder.name} is being worked on by another process: two would mix their results. Wait for it, or stop it, "
            "then try again"
        ) from None
    except OSError as error:
        raise RunInterrupted(
            f"{preview(str(folder), 200)} cannot be written: {error}; free space, or go to a folder of your own"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
