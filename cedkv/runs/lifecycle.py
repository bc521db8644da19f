"""A run from its start, or its resume, to its end: its folder, locked for this process; its journal; its MLflow run.

Finished units are on disk at any moment. A run ends as FINISHED, FAILED (an error) or KILLED (SIGTERM, SIGINT, SIGHUP), with
the data computed so far. A run that could not set its status (kill -9, power loss) gets it from ``resume`` or ``sync``.
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
from cedkv.core.text import sentence
from cedkv.runs import journal
from cedkv.runs.journal import Journal
from cedkv.runs.manifest import (
    MERGED_FROM,
    NAME,
    RunManifest,
    load_manifest,
    reject_other_config,
    report_full_disk,
)
from cedkv.runs.outputs import OUTPUTS, VARIABLE, is_temporary, locked, require_outputs
from cedkv.runs.resolved import ResolvedRun
from cedkv.runs.tags import CODE
from cedkv.runs.tracking import MlflowTracker


class ActiveRun:
    """A run in progress.

    manifest: the run's manifest. children: manifests of its nested runs, by condition key.
    """

    def __init__(self, resolved: ResolvedRun, tags: Mapping[str, str]) -> None:
        self.manifest, self.resumed = resolved.manifest, resolved.resumed
        self.children: dict[str, RunManifest] = {}
        self._config, self._tags = resolved.config, tags
        self._tracker = MlflowTracker(resolved.config.runtime.mlflow_timeout)
        self._journal: Journal | None = None
        self._begun = False
        """Whether the run is this process's: locked, and a resumed one RUNNING again."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.manifest.folder

    def start(self, stack: ExitStack) -> None:
        """Lock the folder until ``stack`` ends; a new run is created in MLflow first, because its id names the folder."""
        if is_temporary(self.manifest.home):
            click.echo(
                f"warning: results go to {self.manifest.home}, a temporary folder, as mlflow run makes for a project that it "
                f"has fetched: nothing keeps it, and MLflow's copy of a run cannot be resumed or merged. Set {VARIABLE} to a "
                "folder of your own, as an absolute path",
                err=True,
            )
        if not self.resumed:
            self.manifest.tags |= self._tags
            self._tracker.start(self.manifest)
        stack.enter_context(locked(self.folder))
        if not self.resumed:
            self._begun = True
            self.manifest.write(self._config)
            self.push()
            self._monitor()

    def open_journal(self, depends_on: Mapping[str, Any], conditions: Sequence[str]) -> Journal:
        """Return the run's journal, new or existing.

        A resumed run becomes RUNNING here and not earlier, so that a resume that is rejected leaves the run as it was.

        Args:
            depends_on: every value that the run's records depend on, flat.
            conditions: keys of the conditions.

        Raises:
            ConfigError: a value that the run depends on has changed since the run was started.
        """
        path, header = self.folder / journal.NAME, {"run_id": self.manifest.run_id, **depends_on}
        if path.exists() and self._config.runtime.allow_other_code:
            stored = journal.read_header(path)
            changed = [name for name in {**stored, **header} if journal.is_code(name) and stored.get(name) != header.get(name)]
            header = {name: value for name, value in header.items() if name not in changed}
            header |= {name: stored[name] for name in changed if name in stored}
            self._tags = {**self._tags, **({CODE: "changed"} if changed else {})}
        self._journal = Journal(path, header, conditions)
        if self.resumed:
            self.manifest.tags |= self._tags
            with _or_as_a_new_run(self.folder):
                self._tracker.reopen(self.manifest)
            self._begun = True
            self._tracker.retire(self.manifest)
            self.manifest.save()
            self._monitor()
        return self._journal

    def child(self, key: str, name: str, config: Phase2Config, tags: Mapping[str, str]) -> RunManifest:
        """Return the manifest of a condition's nested run: a new run, or, in a resumed comparison, the existing one."""
        if key in self.manifest.children:
            child = load_manifest(self.manifest.home / self.manifest.children[key])
            child.tags |= tags
            with _or_as_a_new_run(self.folder):
                self._tracker.reopen(child, self.manifest)
        else:
            origin = f"local-{sha256(f'{self.manifest.origin} {key}'.encode()).hexdigest()[:32]}"
            parent, phase = self.manifest.run_id, self.manifest.phase
            child = RunManifest(
                "condition", phase, name, parent=parent, origin=origin, tags=dict(tags), home=self.manifest.home
            )
            self._tracker.start_child(child, self.manifest)
            child.write(config)
            self.manifest.children[key] = child.run_id
            self.manifest.save()
        self.children[key] = child
        return child

    def _monitor(self) -> None:
        """Log the machine's load from here on, where that is asked for and a model computes; of a comparison to the parent."""
        if self._config.runtime.system_metrics and MERGED_FROM not in self.manifest.tags:
            self._tracker.start_monitor(self.manifest)

    def push(self) -> None:
        """Log the manifest as it is now."""
        self._tracker.push(self.manifest)

    def finish(self, manifest: RunManifest) -> None:
        """End and log a run that has written all its files: this run or a nested one."""
        manifest.finish("FINISHED")
        manifest.save()
        if manifest is self.manifest:
            self._tracker.stop_monitor()
            self._tracker.retry()
            self._tracker.push(manifest, files=True)
            for child in self.children.values():
                if not child.logged:
                    self._tracker.push(child, manifest, files=True)
        else:
            self._tracker.push(manifest, self.manifest, files=True)

    @property
    def fault(self) -> str | None:
        """The reason why MLflow does not have everything; None when it has."""
        complete = all(manifest.logged for manifest in (self.manifest, *self.children.values()))
        return None if complete else self._tracker.fault or "not everything was logged"

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()

    def fail(self, error: BaseException) -> None:
        """End this run and its unfinished nested runs with the data they have; ``error`` is what ended them.

        Errors in here are suppressed, because ``error`` says more.
        """
        if not self._begun and (isinstance(error, ConfigError) or (self.resumed and self._journal is None)):
            # The resume, the run to take over, or its experiment was rejected, or another process works on the run.
            if self.manifest.home == OUTPUTS:
                with suppress(OSError):  # runs are in it; else it was made to see whether it can be written
                    OUTPUTS.rmdir()
            return
        if not (self.folder / NAME).exists() and not isinstance(error, CedkvError):
            with suppress(OSError):  # ended while MLflow was creating the run: nothing a resume needs is written yet
                self.manifest.write(self._config)
        self._tracker.stop_monitor()
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        for manifest in (self.manifest, *(child for child in self.children.values() if child.status == "RUNNING")):
            manifest.finish(status)
            with suppress(OSError, CedkvError):
                self._tracker.push(manifest, None if manifest is self.manifest else self.manifest, files=True)
        if status == "KILLED" or not isinstance(error, CedkvError):
            click.echo(
                f"run {self.manifest.run_id} ended as {status}; its data is in {self.folder}. {sentence(self.manifest.remedy)}",
                err=True,
            )


@contextmanager
def open_run(resolved: ResolvedRun, tags: Mapping[str, str]) -> Iterator[ActiveRun]:
    """Start or resume a run; whatever happens in the block, the run ends with the data it has.

    Args:
        tags: tags of a run without results.

    Raises:
        ConfigError: the run was started with another configuration, or another process works on it.
        RunInterrupted: the run's folder cannot be written.
        TrackingError: the run is finished, but MLflow does not have everything.
    """
    if resolved.resumed:
        reject_other_config(resolved.manifest, resolved.config)
    else:
        require_outputs()
    active = ActiveRun(resolved, tags)
    manifest = active.manifest
    with ExitStack() as stack:
        try:
            with report_full_disk(manifest):
                active.start(stack)
                yield active
        except BaseException as error:
            active.fail(error)
            raise
        finally:
            active.close()
    if active.fault is not None:
        raise TrackingError(
            f"the results are safe in {manifest.folder}, but not (all) of them are logged: {active.fault}\n"
            f"When MLflow answers again: python -m cedkv sync {manifest.folder}   (or, as a new run, with --experiment NAME)"
        )


@contextmanager
def _or_as_a_new_run(folder: Path) -> Iterator[None]:
    """Add to a ConfigError in the block, by which MLflow has lost a run, how the run's folder is logged all the same."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}; or log the folder as a new run: python -m cedkv sync {folder} --experiment NAME") from None


def sync(folder: Path, timeout: int, report: Callable[[str], None], experiment: str | None = None) -> None:
    """Log a run and its nested runs from its folder; logging again changes nothing. A run without an end is ended as KILLED.

    Args:
        timeout: longest wait for a call to MLflow, in seconds.
        report: called with a line per logged run.
        experiment: name of the experiment in which the runs are logged as new ones, whatever became of those that they were
            logged as; a run that this experiment has of them already is completed. None: the runs that they were logged as.

    Raises:
        ConfigError: not the folder of a run, or another process works on the run; or a run or its experiment is not in MLflow
            any more.
        TrackingError: MLflow still does not have everything.
    """
    manifest = load_manifest(folder)
    if manifest.parent is not None:
        raise ConfigError(
            f"{str(folder)!r} is a condition of comparison {manifest.parent}: sync the comparison, it logs its conditions too"
        )
    tracker = MlflowTracker(timeout)
    with locked(folder):
        children = [load_manifest(folder.parent / run_id) for run_id in manifest.children.values()]
        parents = {run.origin: None if run is manifest else manifest for run in (manifest, *children)}
        for run in (manifest, *children):
            if run.end_time is None:
                run.finish("KILLED")
            if experiment is not None:
                run.log_as_new(experiment)
        with _or_as_a_new_run(folder):
            for run in (manifest, *children):
                tracker.find(run, parents[run.origin])
        for run in (manifest, *children) if tracker.fault is None else ():
            tracker.push(run, parents[run.origin], files=True)
            if run.logged:
                report(f"{run.run_id}: logged as run {run.mlflow_run_id}, {run.status}")
    if tracker.fault is not None:
        raise TrackingError(f"the results are safe in {folder}, but not (all) of them are logged: {tracker.fault}")
