"""A run from its start, or its resume, to its end: its folder, held for this process alone; its journal; its MLflow run.

What is finished is on disk at any moment. A run ends as FINISHED, FAILED (an error) or KILLED (SIGTERM, SIGINT, SIGHUP),
with the data it has. One that ends without any of it (kill -9, power) is set right by ``resume`` or ``sync``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import CedkvError, ConfigError, TrackingError
from cedkv.runs import journal
from cedkv.runs.journal import Journal
from cedkv.runs.manifest import (
    NAME,
    RunManifest,
    load_manifest,
    locked,
    reject_other_config,
    require_outputs,
    storing,
)
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.tracking import MlflowTracker


class ActiveRun:
    """A run under way.

    manifest: the run's own. children: manifests of its nested runs, by condition key.
    """

    def __init__(self, resolved: ResolvedRun, tags: Mapping[str, str]) -> None:
        self.manifest, self.resumed = resolved.manifest, resolved.resumed
        self.children: dict[str, RunManifest] = {}
        self._config, self._tags = resolved.config, tags
        self._tracker = MlflowTracker(resolved.config.runtime.mlflow_timeout)
        self._journal: Journal | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.manifest.folder

    def start(self, held: ExitStack) -> None:
        """Take hold of the folder; make the MLflow run first when this is a new one, because the folder has its id."""
        if not self.resumed:
            self.manifest.tags |= self._tags
            self._tracker.start(self.manifest)
        held.enter_context(locked(self.folder))
        if not self.resumed:
            self.manifest.write(self._config)
            self.push()

    def open_journal(self, depends_on: Mapping[str, Any], conditions: Sequence[str]) -> Journal:
        """Return the journal, new or to go on with. A resumed run becomes RUNNING here: a rejected one stays as it was.

        Raises:
            ConfigError: the run depends on something else than when it was started.
        """
        self._journal = Journal(self.folder / journal.NAME, {"run_id": self.manifest.run_id, **depends_on}, conditions)
        if self.resumed:
            self.manifest.tags |= self._tags
            self._tracker.reopen(self.manifest)
            self._tracker.retire(self.manifest)
            self.manifest.save()
        return self._journal

    def child(self, key: str, name: str, config: Phase2Config, tags: Mapping[str, str]) -> RunManifest:
        """Return the nested run of a condition: a new one, or, in a resumed comparison, the existing one."""
        if key in self.manifest.children:
            child = load_manifest(self.manifest.home / self.manifest.children[key])
            child.tags |= tags
            self._tracker.reopen(child, self.manifest)
        else:
            origin = f"local-{sha256(f'{self.manifest.origin} {key}'.encode()).hexdigest()[:32]}"
            parent, phase = self.manifest.run_id, self.manifest.phase
            child = RunManifest("condition", phase, name, parent=parent, origin=origin, tags=dict(tags))
            self._tracker.start_child(child, self.manifest)
            child.write(config)
            self.manifest.children[key] = child.run_id
            self.manifest.save()
        self.children[key] = child
        return child

    def push(self) -> None:
        """Log what is known so far."""
        self._tracker.push(self.manifest)

    def finish(self, manifest: RunManifest) -> None:
        """End a run, this one or a nested one, that has written all its files, and log it."""
        manifest.finish("FINISHED")
        manifest.save()
        if manifest is self.manifest:
            self._tracker.retry()
            self._tracker.push(manifest, files=True)
            for child in self.children.values():
                if not child.logged:
                    self._tracker.push(child, manifest, files=True)
        else:
            self._tracker.push(manifest, self.manifest, files=True)

    @property
    def fault(self) -> str | None:
        """Why MLflow does not have everything; None when it has."""
        complete = all(manifest.logged for manifest in (self.manifest, *self.children.values()))
        return None if complete else self._tracker.fault or "not everything was logged"

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()

    def fail(self, error: BaseException) -> None:
        """End everything that is under way with its data; faults in here are swallowed, what is raised says more."""
        if self.resumed and self._journal is None:
            return
        if not (self.folder / NAME).exists() and not isinstance(error, CedkvError):
            with suppress(OSError):  # ended while MLflow was making the run: what a resume needs is not written yet
                self.manifest.write(self._config)
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        for manifest in (self.manifest, *(child for child in self.children.values() if child.status == "RUNNING")):
            manifest.finish(status)
            with suppress(OSError, CedkvError):
                self._tracker.push(manifest, None if manifest is self.manifest else self.manifest, files=True)
        if status == "KILLED" or not isinstance(error, CedkvError):
            click.echo(
                f"run {self.manifest.run_id} ended as {status}; its data is in {self.folder}. Go on with --resume "
                f"{self.manifest.run_id}",
                err=True,
            )


@contextmanager
def open_run(resolved: ResolvedRun, tags: Mapping[str, str]) -> Iterator[ActiveRun]:
    """Start a run, or go on with it; whatever happens inside, it ends with the data it has.

    Args:
        tags: the tags of a run that has no results yet.

    Raises:
        ConfigError: a run that cannot be resumed like this, or on which another process works.
        RunInterrupted: its folder cannot be written.
        TrackingError: the run is finished, but MLflow does not have everything.
    """
    if resolved.resumed:
        reject_other_config(resolved.manifest, resolved.config)
    else:
        require_outputs()
    active = ActiveRun(resolved, tags)
    manifest = active.manifest
    with ExitStack() as held:
        try:
            with storing(manifest):
                active.start(held)
                yield active
        except BaseException as error:
            active.fail(error)
            raise
        finally:
            active.close()
    if active.fault is not None:
        raise TrackingError(
            f"the results are safe in {manifest.folder}, but not (all) of them are logged: {active.fault}\n"
            f"When MLflow answers again: python -m cedkv sync {manifest.folder}"
        )


def sync(folder: Path, timeout: int, say: Callable[[str], None]) -> None:
    """Log a run and its nested runs from its folder, as often as one likes. A run that was killed is ended as KILLED.

    Raises:
        ConfigError: no folder of a run, or another process works on it.
        TrackingError: MLflow still does not have everything.
    """
    manifest = load_manifest(folder)
    if manifest.parent is not None:
        raise ConfigError(f"{str(folder)!r} is a condition of comparison {manifest.parent}: sync that one, it logs both")
    tracker = MlflowTracker(timeout)
    with locked(folder):
        children = [load_manifest(folder.parent / run_id) for run_id in manifest.children.values()]
        for each in (manifest, *children):
            if each.end_time is None:
                each.finish("KILLED")
            each.known = False
            tracker.push(each, None if each is manifest else manifest, files=True)
            if each.logged:
                say(f"{each.run_id}: logged as run {each.mlflow_run_id}, {each.status}")
    if tracker.fault is not None:
        raise TrackingError(f"the results are safe in {folder}, but not (all) of them are logged: {tracker.fault}")
