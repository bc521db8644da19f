"""A run from its start, or its resume, to its end: its folder, held for this process alone; its journal; its MLflow run.

What was finished is on disk at any moment. A run ends as FINISHED, FAILED (an error) or KILLED (SIGTERM, SIGINT, SIGHUP),
with the data it has. One that ends without any of it (kill -9, power) is set right by ``resume`` or ``sync``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import pandas as pd

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import CedkvError, ConfigError, TrackingError
from cedkv.runs import manifest
from cedkv.runs.journal import NAME, Journal
from cedkv.runs.manifest import TABLES, RunManifest, locked, refuse_other_config, require_outputs, storing
from cedkv.runs.tracking import MlflowTracker


class ActiveRun:
    """A run under way.

    entry: the run; children: its nested runs, by condition key.
    """

    def __init__(
        self, config: Phase2Config, entry: RunManifest, tracker: MlflowTracker, tags: Mapping[str, str], resumed: bool
    ) -> None:
        self.entry, self.resumed = entry, resumed
        self.children: dict[str, RunManifest] = {}
        self._config, self._tracker, self._tags = config, tracker, tags
        self._journal: Journal | None = None

    @property
    def folder(self) -> Path:
        return self.entry.folder

    def start(self, held: ExitStack) -> None:
        """Take hold of the folder; make the MLflow run first when this is a new one, because the folder has its id."""
        if not self.resumed:
            self.entry.tags |= self._tags
            self._tracker.start(self.entry)
        held.enter_context(locked(self.folder))
        if not self.resumed:
            self.entry.write(self._config)
            self.push()

    def open_journal(self, depends_on: Mapping[str, Any], conditions: Sequence[str]) -> Journal:
        """The journal, new or to go on with. A run that is resumed becomes RUNNING here: one that is refused stays as it was.

        Raises:
            ConfigError: the run depends on something else than when it was started.
        """
        self._journal = Journal(self.folder / NAME, {"run_id": self.entry.run_id, **depends_on}, conditions)
        if self.resumed:
            self.entry.tags |= self._tags
            self._tracker.reopen(self.entry)
            self._tracker.retire(self.entry)
            self.entry.save()
        return self._journal

    def child(self, key: str, name: str, config: Phase2Config, tags: Mapping[str, str]) -> RunManifest:
        """The nested run of a condition: made, or, in a resumed comparison, the one there is."""
        if key in self.entry.children:
            child = manifest.load(self.entry.home / self.entry.children[key])
            child.tags |= tags
            self._tracker.reopen(child, self.entry)
        else:
            origin = f"local-{sha256(f'{self.entry.origin} {key}'.encode()).hexdigest()[:32]}"
            child = RunManifest("condition", self.entry.phase, name, parent=self.entry.run_id, origin=origin, tags=dict(tags))
            self._tracker.start_child(child, self.entry)
            child.write(config)
            self.entry.children[key] = child.run_id
            self.entry.save()
        self.children[key] = child
        return child

    def push(self) -> None:
        """Log what is known so far."""
        self._tracker.push(self.entry)

    def finish(self, entry: RunManifest) -> None:
        """A run, this one or a nested one, has written all its files: log it and end it."""
        entry.finish("FINISHED")
        entry.save()
        if entry is self.entry:
            self._tracker.retry()
            self._tracker.push(entry, files=True)
            for child in self.children.values():
                if not child.logged:
                    self._tracker.push(child, entry, files=True)
        else:
            self._tracker.push(entry, self.entry, files=True)

    @property
    def fault(self) -> str | None:
        """Why MLflow does not have everything; None when it has."""
        whole = all(entry.logged for entry in (self.entry, *self.children.values()))
        return None if whole else self._tracker.fault or "not everything was logged"

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()

    def fail(self, error: BaseException) -> None:
        """End everything that is under way, with the data there is; what is raised says more than a fault in here."""
        if self.resumed and self._journal is None:
            return
        if not (self.folder / manifest.NAME).exists() and not isinstance(error, CedkvError):
            with suppress(OSError):  # ended while MLflow was making the run: what a resume needs is not there yet
                self.entry.write(self._config)
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        for entry in (self.entry, *(child for child in self.children.values() if child.status == "RUNNING")):
            entry.finish(status)
            with suppress(OSError, CedkvError):
                self._tracker.push(entry, None if entry is self.entry else self.entry, files=True)
        if status == "KILLED" or not isinstance(error, CedkvError):
            click.echo(
                f"run {self.entry.run_id} ended as {status}; what it had is in {self.folder}. Go on with --resume "
                f"{self.entry.run_id}",
                err=True,
            )


@contextmanager
def open_run(config: Phase2Config, entry: RunManifest, tags: Mapping[str, str], resumed: bool) -> Iterator[ActiveRun]:
    """A run: made here, or (``resumed``) found by ``entry.find``.

    Args:
        tags: the tags of a run that has no results yet.

    Raises:
        ConfigError: it is not to be resumed like this, or another process works on it.
        RunInterrupted: it cannot be written.
        TrackingError: it is finished, but MLflow does not have everything.
    """
    job = ActiveRun(config, entry, MlflowTracker(config.runtime.mlflow_timeout), tags, resumed)
    if resumed:
        refuse_other_config(entry, config)
    else:
        require_outputs()
    with ExitStack() as held:
        try:
            with storing(entry):
                job.start(held)
                yield job
        except BaseException as error:
            job.fail(error)
            raise
        finally:
            job.close()
    if job.fault is not None:
        raise TrackingError(
            f"the results are safe in {entry.folder}, but not (all) of them are logged: {job.fault}\n"
            f"When MLflow answers again: python -m cedkv sync {entry.folder}"
        )


def save_table(entry: RunManifest, name: str, table: pd.DataFrame) -> None:
    """Write a table the way MLflow's UI reads it; it is logged at the run's root."""
    path = entry.folder / TABLES / name
    path.parent.mkdir(exist_ok=True)
    table.to_json(path, orient="split", index=False, date_format="iso")


def sync(folder: Path, timeout: int, say: Callable[[str], None]) -> None:
    """Log a run, and its nested runs, from its folder; as often as one likes. One that was killed is ended as KILLED.

    Raises:
        ConfigError: no folder of a run, or another process works on it.
        TrackingError: MLflow still does not have everything.
    """
    entry = manifest.load(folder)
    if entry.parent is not None:
        raise ConfigError(f"{str(folder)!r} is a condition of comparison {entry.parent}: sync that one, it logs both")
    tracker = MlflowTracker(timeout)
    with locked(folder):
        children = [manifest.load(folder.parent / run_id) for run_id in entry.children.values()]
        for each in (entry, *children):
            if each.end_time is None:
                each.finish("KILLED")
            each.known = False
            tracker.push(each, None if each is entry else entry, files=True)
            if each.logged:
                say(f"{each.run_id}: logged as run {each.mlflow_run_id}, {each.status}")
    if tracker.fault is not None:
        raise TrackingError(f"the results are safe in {folder}, but not (all) of them are logged: {tracker.fault}")
