"""Runs in MLflow. Results are on disk before they are logged here.

A ``RunManifest`` says what MLflow has to store of a run; ``MlflowTracker.push`` stores it, and may be called any number of
times.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import mlflow
import pandas as pd
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils import name_utils

from cedkv.core.errors import ConfigError
from cedkv.core.text import preview, redact
from cedkv.runs import journal
from cedkv.runs.connection import EXPERIMENT, Connection
from cedkv.runs.destination import (
    ORIGIN,
    check_free,
    existing_run,
    find_by_origin,
    find_experiment,
    is_free,
    made_by_mlflow_run,
)
from cedkv.runs.manifest import NAME, NOTE, TABLES, TAG_LENGTH, RunManifest, is_run_id, now
from cedkv.runs.outputs import LOCK
from cedkv.runs.timeouts import call_with_timeout, single_attempt
from cedkv.runs.ui import compare_page, how_to_look, ui_links, ui_server

PARENT, RESUMED = "mlflow.parentRunId", "cedkv.resumed"
NOT_ARTIFACTS = {NAME, LOCK, journal.NAME, TABLES}
"""Names in a run's folder that are not logged under their own path: bookkeeping, and tables, which go to the run's root."""
SYSTEM_METRICS_INTERVAL = 5
"""Seconds between two readings of the machine, where MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL does not say otherwise."""


class MlflowTracker(Connection):
    """Logs the runs of one process to MLflow."""

    def __init__(self, timeout: int) -> None:
        super().__init__(timeout)
        self._monitor: Any = None
        self._confirmed: set[str] = set()
        """Origins of the runs that MLflow has confirmed in this process."""
        self._run_ids: dict[str, str] = {}
        """Name of a run's folder -> the run's id in MLflow, which is another one where the run was logged later."""
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # its errors quote the server's address

    def start(self, manifest: RunManifest) -> None:
        """Take over the run that ``mlflow run`` has created, or create one; if MLflow fails, the run is local for now.

        A run to take over stays in its experiment. Any other goes to the one that MLflow's environment variables say.

        Raises:
            ConfigError: the run to take over, or the experiment, cannot be used.
        """
        manifest.experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or None
        default = EXPERIMENT if manifest.experiment_id is None else None
        manifest.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or default
        try:
            self.attempt("no run could be started", lambda: self._ensure_run(manifest, starting=True), rejecting=True)
        except ConfigError as error:
            if manifest.mlflow_run_id is None:
                raise
            raise ConfigError(
                f"MLFLOW_RUN_ID = {manifest.mlflow_run_id}: {error}. For a new run unset MLFLOW_RUN_ID (with mlflow run, leave "
                "--run-id out)"
            ) from None
        manifest.run_id = manifest.mlflow_run_id or manifest.origin

    def start_child(self, manifest: RunManifest, parent: RunManifest) -> None:
        """Create the nested run of a condition; if MLflow fails, it is local for now."""
        manifest.experiment, manifest.experiment_id = parent.experiment, parent.experiment_id
        self.attempt("no nested run could be started", lambda: self._ensure_run(manifest, parent))
        manifest.run_id = manifest.mlflow_run_id or manifest.origin

    def reopen(self, manifest: RunManifest, parent: RunManifest | None = None) -> None:
        """Set a run that is resumed to RUNNING, whatever its status; errors as ``find``."""
        manifest.status, manifest.end_time, manifest.logged = "RUNNING", None, False
        self.find(manifest, parent)

    def find(self, manifest: RunManifest, parent: RunManifest | None = None) -> None:
        """Find the run that a manifest is logged as, with the manifest's status, or create it where there is none yet.

        Raises:
            ConfigError: this MLflow does not have the run, or the run or its experiment was deleted there, or it is not the
                manifest's.
        """
        self.attempt("the run could not be found", lambda: self._ensure_run(manifest, parent), rejecting=True)

    def retire(self, manifest: RunManifest) -> None:
        """End the run that ``mlflow run -P resume=...`` has created for itself, with a pointer to the resumed run.

        The run is not deleted, because ``mlflow run`` would then fail; it gets a name that says what it is.
        """
        carrier_id = os.environ.get("MLFLOW_RUN_ID")
        if carrier_id and carrier_id != manifest.mlflow_run_id:
            self.attempt(f"run {carrier_id}, made by mlflow run, was not ended", lambda: self._retire(carrier_id, manifest))

    def push(self, manifest: RunManifest, parent: RunManifest | None = None, *, files: bool = False) -> None:
        """Log what the manifest says: parameters, inputs, metrics, tags and, with ``files``, the run's tables and files.

        A run with an end time is ended in MLflow too: a FINISHED run after its files are logged, any other run before, because
        time may be short.
        """
        self.attempt("not everything was logged", lambda: self._push(manifest, parent, files))
        manifest.save()

    def start_monitor(self, manifest: RunManifest) -> None:
        """Let MLflow log the machine's load to the run (``system/...``) until ``stop_monitor``; of a resumed run it goes on.

        The figures are MLflow's alone: they are not in the run's folder, and end where MLflow stops answering.
        """
        self.attempt("no system metrics are logged", lambda: self._start_monitor(str(manifest.mlflow_run_id)))

    def stop_monitor(self) -> None:
        """Stop logging the machine's load, if it is logged; after a fault nothing is waited for."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            with suppress(TimeoutError):  # it ends by itself then, at its next reading
                call_with_timeout(monitor.finish, 0 if self.fault else self.timeout)

    def _start_monitor(self, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # imports psutil, an extra

        self._monitor = self.call(
            lambda _: SystemMetricsMonitor(run_id, sampling_interval=SYSTEM_METRICS_INTERVAL, resume_logging=True)
        )
        self._monitor.start()

    def _ensure_run(self, manifest: RunManifest, parent: RunManifest | None = None, *, starting: bool = False) -> None:
        """Make sure that MLflow has the manifest's run: its own, one created for it before, or a new one.

        A run that was made beforehand is checked once, by its results; from then on it is the manifest's.
        """
        if manifest.origin in self._confirmed:
            return
        if parent is not None:
            self._ensure_run(parent)
        if manifest.mlflow_run_id is None:
            experiment = self.call(lambda client: find_experiment(client, manifest.experiment, manifest.experiment_id))
            found = self.call(lambda client: find_by_origin(client, experiment, manifest.origin))
            if found is not None:
                manifest.mlflow_run_id = _run_id(found)
            else:
                parent_tag = {} if parent is None else {PARENT: str(parent.mlflow_run_id)}
                tags = resolve_tags({ORIGIN: manifest.origin, **manifest.tags, **parent_tag})
                tags = {name: redact(value)[:TAG_LENGTH] for name, value in tags.items()}
                with single_attempt(self.timeout):
                    run = self.call(lambda client: client.create_run(experiment, manifest.start_time, tags, manifest.name))
                manifest.mlflow_run_id = _run_id(run)
                self._confirm(manifest, experiment)
                return
        run_id = manifest.mlflow_run_id
        run = self.call(lambda client: existing_run(client, run_id))
        if not manifest.known and run.data.tags.get(ORIGIN) != manifest.origin:
            self.call(lambda client: check_free(client, run, may_have_ended=not starting))
        if run.info.run_name and not _is_generated(run.info.run_name):
            manifest.name = run.info.run_name  # the user chose this name
        self.call(lambda client: client.update_run(run_id, status=manifest.status, name=manifest.name))
        self._confirm(manifest, run.info.experiment_id)
        manifest.not_before(run.info.start_time or 0)

    def _confirm(self, manifest: RunManifest, experiment_id: str) -> None:
        manifest.experiment, manifest.experiment_id, manifest.known = None, experiment_id, True
        self._confirmed.add(manifest.origin)
        self._run_ids[manifest.run_id] = str(manifest.mlflow_run_id)

    def _push(self, manifest: RunManifest, parent: RunManifest | None, files: bool) -> None:
        self._ensure_run(manifest, parent)
        run_id = str(manifest.mlflow_run_id)
        inputs = [_dataset_input(description) for description in manifest.datasets]
        timestamp = manifest.metrics_at or now()
        metrics = [Metric(name, value, timestamp, 0) for name, value in manifest.metrics.items()]
        params = [Param(name, value) for name, value in manifest.params.items()]
        described = {NOTE: ui_links(manifest.tags[NOTE], manifest)} if NOTE in manifest.tags else {}
        named = {name: self._run_ids.get(value, value) for name, value in manifest.tags.items()}
        described[ORIGIN] = manifest.origin
        tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in {**named, **described}.items()]
        self.call(lambda client: client.log_batch(run_id, metrics, params, tags))
        if inputs:
            self.call(lambda client: client.log_inputs(run_id, datasets=inputs))
        ended = manifest.end_time is not None
        if ended and manifest.status != "FINISHED":
            self.call(lambda client: client.set_terminated(run_id, manifest.status, manifest.end_time))
        if files:
            self._push_files(manifest, run_id)
        if ended and manifest.status == "FINISHED":
            self.call(lambda client: client.set_terminated(run_id, manifest.status, manifest.end_time))
        manifest.logged = files and ended

    def _push_files(self, manifest: RunManifest, run_id: str) -> None:
        files = [
            file
            for file in sorted(manifest.folder.rglob("*"))
            if file.is_file() and not file.is_symlink() and file.suffix != ".part"
        ]
        for file in files:
            relative = file.relative_to(manifest.folder)
            if relative.parts[0] not in NOT_ARTIFACTS:
                self._upload(run_id, file, None if len(relative.parts) == 1 else relative.parent.as_posix())
        tables = [file for file in files if file.parent.name == TABLES]
        for file in tables:
            self._upload(run_id, file, None)
        if tables:  # the tag that mlflow.log_table sets; log_table itself would append to a table that was logged before
            logged_tables = json.dumps([{"path": file.name, "type": "table"} for file in tables])
            self.call(lambda client: client.set_tag(run_id, "mlflow.loggedArtifacts", logged_tables))

    def _upload(self, run_id: str, file: Path, artifact_folder: str | None) -> None:
        self.call(lambda client: client.log_artifact(run_id, str(file), artifact_folder))

    def _retire(self, carrier_id: str, manifest: RunManifest) -> None:
        carrier = self.call(lambda client: client.get_run(carrier_id))
        if not made_by_mlflow_run(carrier) or not self.call(lambda client: is_free(client, carrier)):
            return  # not a run that mlflow run has just created
        note = f"This run only carried `mlflow run -P resume={manifest.mlflow_run_id}`; the results are in that run."
        tags = {RESUMED: str(manifest.mlflow_run_id), NOTE: note}
        if _is_generated(carrier.info.run_name):
            tags["mlflow.runName"] = f"resume of {manifest.name}"
        self.call(lambda client: client.log_batch(carrier_id, tags=[RunTag(*tag) for tag in tags.items()]))
        self.call(lambda client: client.set_terminated(carrier_id, "FINISHED"))
        click.echo(f"results go to run {manifest.mlflow_run_id}; run {carrier_id} only carries the resume", err=True)


def describe_datasets(tables: Mapping[str, tuple[str, pd.DataFrame]]) -> list[dict[str, str]]:
    """Return MLflow's descriptions of the samples, each with its digest and ``context``.

    Args:
        tables: context (on, off) -> where the samples come from, and the samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about schema inference, which is not used
        return [
            {"context": context, **mlflow.data.from_pandas(table, name=redact(source)[:500]).to_dict()}
            for context, (source, table) in tables.items()
        ]


def where_to_look(manifest: RunManifest) -> str:
    """Return how to open the run in MLflow's UI, for the store in use."""
    return how_to_look(mlflow.get_tracking_uri(), manifest)


def compare_view(manifest: RunManifest, mode: str) -> str:
    """Return the address of the UI's page that compares the nested runs of a run.

    Args:
        mode: ``CHART`` for a bar chart per metric, ``ARTIFACT`` for tables side by side.
    """
    return f"{ui_server(mlflow.get_tracking_uri())}/{compare_page(manifest, mode)}"


def _is_generated(name: str | None) -> bool:
    """Return whether MLflow gave a run its name, because the user gave none: two words of its own lists, and a number to 1000.

    The lists are not public. Where a release of MLflow has none, every name counts as the user's.
    """
    predicate, _, rest = (name or "").partition("-")
    noun, _, number = rest.partition("-")
    words = (getattr(name_utils, "_GENERATOR_PREDICATES", ()), getattr(name_utils, "_GENERATOR_NOUNS", ()))
    return predicate in words[0] and noun in words[1] and number in map(str, range(1001))


def _run_id(run: Any) -> str:
    """Return a run's id, which names its folder; raise ValueError for an id that a broken server has made a path of."""
    run_id = str(run.info.run_id)
    if not is_run_id(run_id):
        raise ValueError(f"{preview(run_id)} was answered as the id of a run")
    return run_id


def _dataset_input(description: Mapping[str, str]) -> DatasetInput:
    dataset = {key: value for key, value in description.items() if key != "context"}
    return DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", description["context"])])
