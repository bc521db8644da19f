"""MLflow: no other module imports it. Results are on disk before they are logged here.

A ``RunManifest`` says what MLflow has to store of a run; ``MlflowTracker.push`` stores it, and may be called any number of
times. No call is waited for longer than ``timeout`` seconds, and after a failed call no other is made until ``retry``: an
unreachable server costs a run one wait and one warning, not its results.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import click
import mlflow
import pandas as pd
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from cedkv.core.errors import ConfigError
from cedkv.core.locks import exclusive_lock
from cedkv.core.text import preview, redact
from cedkv.runs import journal
from cedkv.runs.manifest import LOCK, NAME, NOTE, TABLES, TAG_LENGTH, RunManifest, is_run_id, now
from cedkv.runs.store import check_database, explain
from cedkv.runs.timeouts import call_with_timeout, set_http_timeouts, single_attempt
from cedkv.runs.ui import compare_page, how_to_look, ui_links, ui_server

T = TypeVar("T")
EXPERIMENT = "cedkv"
ORIGIN, PARENT, RESUMED = "cedkv.origin", "mlflow.parentRunId", "cedkv.resumed"
NOT_ARTIFACTS = {NAME, LOCK, journal.NAME, TABLES}
"""Names in a run's folder that are not logged under their own path: bookkeeping, and tables, which go to the run's root."""
CLIENT_SETTINGS = {
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, where the user has set none.

The client of a server that keeps artifacts in a cloud's store would ask that store for files by signed addresses, which often
only the server can reach. And it would print the server's address after each run, with the credentials in it.
"""
SYSTEM_METRICS_INTERVAL = 5
"""Seconds between two readings of the machine, where MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL does not say otherwise."""
_GENERATED_NAME = re.compile(r"^[a-z]+-[a-z]+-\d+$")


class MlflowTracker:
    """Logs the runs of one process to MLflow.

    timeout: longest wait for a call, in seconds; MLflow's HTTP client gives up within it (``timeouts.set_http_timeouts``).
    fault: the error after which no more calls are made; None while MLflow answers.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout
        self.fault: str | None = None
        self._warned = False
        self._client: Any = None
        self._monitor: Any = None
        set_http_timeouts(timeout)
        for setting, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(setting, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning from here, not one per attempt
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # its errors quote the server's address

    def start(self, manifest: RunManifest) -> None:
        """Take over the run that ``mlflow run`` has created, or create one; if MLflow fails, the run is local for now.

        Raises:
            ConfigError: the run to take over was deleted.
        """
        manifest.experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self._attempt("no run could be started", lambda: self._ensure_run(manifest, None))
        manifest.run_id = manifest.mlflow_run_id or manifest.origin

    def start_child(self, manifest: RunManifest, parent: RunManifest) -> None:
        """Create the nested run of a condition; if MLflow fails, it is local for now."""
        manifest.experiment = parent.experiment
        self._attempt("no nested run could be started", lambda: self._ensure_run(manifest, parent))
        manifest.run_id = manifest.mlflow_run_id or manifest.origin

    def reopen(self, manifest: RunManifest, parent: RunManifest | None = None) -> None:
        """Set a run that is resumed to RUNNING, whatever its status.

        Raises:
            ConfigError: this MLflow does not have the run, or the run is deleted there.
        """
        manifest.status, manifest.end_time, manifest.logged, manifest.known = "RUNNING", None, False, False
        self._attempt("the run could not be opened again", lambda: self._ensure_run(manifest, parent))

    def retire(self, manifest: RunManifest) -> None:
        """End the run that ``mlflow run -P resume=...`` has created for itself, with a pointer to the resumed run.

        The run is not deleted, because ``mlflow run`` would then fail; it gets a name that says what it is.
        """
        carrier_id = os.environ.get("MLFLOW_RUN_ID")
        if carrier_id and carrier_id != manifest.mlflow_run_id:
            self._attempt(f"run {carrier_id}, made by mlflow run, was not ended", lambda: self._retire(carrier_id, manifest))

    def push(self, manifest: RunManifest, parent: RunManifest | None = None, *, files: bool = False) -> None:
        """Log what the manifest says: parameters, inputs, metrics, tags and, with ``files``, the run's tables and files.

        A run with an end time is ended in MLflow too: a FINISHED run after its files are logged, any other run before, because
        time may be short.
        """
        self._attempt("not everything was logged", lambda: self._push(manifest, parent, files))
        manifest.save()

    def start_monitor(self, manifest: RunManifest) -> None:
        """Let MLflow log the machine's load to the run (``system/...``) until ``stop_monitor``; of a resumed run it goes on.

        The figures are MLflow's alone: they are not in the run's folder, and end where MLflow stops answering.
        """
        self._attempt("no system metrics are logged", lambda: self._start_monitor(str(manifest.mlflow_run_id)))

    def stop_monitor(self) -> None:
        """Stop logging the machine's load, if it is logged; after a fault nothing is waited for."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            with suppress(TimeoutError):  # it ends by itself then, at its next reading
                call_with_timeout(monitor.finish, 0 if self.fault else self.timeout)

    def retry(self) -> None:
        """Make calls again after a fault."""
        self.fault = None

    def _start_monitor(self, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # imports psutil, an extra

        self._monitor = self.call(
            lambda _: SystemMetricsMonitor(run_id, sampling_interval=SYSTEM_METRICS_INTERVAL, resume_logging=True)
        )
        self._monitor.start()

    def _ensure_run(self, manifest: RunManifest, parent: RunManifest | None) -> None:
        """Make sure that MLflow has the manifest's run: its own, one created for it before, or a new one."""
        if manifest.known:
            return
        if manifest.mlflow_run_id is None:
            experiment = self.call(lambda client: _experiment_id(client, manifest.experiment))
            same_origin = f"tags.`{ORIGIN}` = '{manifest.origin}'"
            runs = self.call(lambda client: client.search_runs([experiment], same_origin, max_results=1))
            if runs:
                manifest.mlflow_run_id = _run_id(runs[0])
            else:
                parent_tag = {} if parent is None else {PARENT: str(parent.mlflow_run_id)}
                tags = resolve_tags({ORIGIN: manifest.origin, **manifest.tags, **parent_tag})
                tags = {name: redact(value)[:TAG_LENGTH] for name, value in tags.items()}
                with single_attempt(self.timeout):
                    run = self.call(lambda client: client.create_run(experiment, manifest.start_time, tags, manifest.name))
                manifest.mlflow_run_id, manifest.experiment, manifest.known = _run_id(run), experiment, True
                return
        run_id = manifest.mlflow_run_id
        try:
            info = self.call(lambda client: client.get_run(run_id)).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(
                f"run {run_id} is not in MLflow at {tracking_uri()}: set MLFLOW_TRACKING_URI to where it is"
            ) from None
        if info.lifecycle_stage == "deleted":
            raise ConfigError(f"run {run_id} was deleted in MLflow; bring it back: mlflow runs restore --run-id {run_id}")
        if info.run_name and not _GENERATED_NAME.match(info.run_name):
            manifest.name = info.run_name  # the user chose this name
        self.call(lambda client: client.update_run(run_id, status=manifest.status, name=manifest.name))
        manifest.experiment, manifest.known = info.experiment_id, True
        manifest.not_before(info.start_time)

    def _push(self, manifest: RunManifest, parent: RunManifest | None, files: bool) -> None:
        self._ensure_run(manifest, parent)
        run_id = str(manifest.mlflow_run_id)
        inputs = [_dataset_input(description) for description in manifest.datasets]
        timestamp = manifest.metrics_at or now()
        metrics = [Metric(name, value, timestamp, 0) for name, value in manifest.metrics.items()]
        params = [Param(name, value) for name, value in manifest.params.items()]
        described = {NOTE: ui_links(manifest.tags[NOTE], manifest)} if NOTE in manifest.tags else {}
        tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in {**manifest.tags, **described}.items()]
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
        data = self.call(lambda client: client.get_run(carrier_id)).data
        if data.tags.get("mlflow.source.type") != "PROJECT" or data.metrics:
            return  # not a run that mlflow run has just created
        note = f"This run only carried `mlflow run -P resume={manifest.mlflow_run_id}`; the results are in that run."
        tags = {RESUMED: str(manifest.mlflow_run_id), NOTE: note, "mlflow.runName": f"resume of {manifest.name}"}
        self.call(lambda client: client.log_batch(carrier_id, tags=[RunTag(*tag) for tag in tags.items()]))
        self.call(lambda client: client.set_terminated(carrier_id, "FINISHED"))
        click.echo(f"results go to run {manifest.mlflow_run_id}; run {carrier_id} only carries the resume", err=True)

    def call(self, call: Callable[[Any], T]) -> T:
        """Return the result of a call with the client, or raise its error; TimeoutError after ``timeout`` seconds."""
        return call_with_timeout(lambda: call(self._open_client()), self.timeout)

    def _open_client(self) -> Any:
        """Return the client; the first contact creates or migrates a local database's tables, which only one process may do."""
        if self._client is None:
            file = check_database(mlflow.get_tracking_uri())
            with exclusive_lock(Path(f"{file}.lock"), self.timeout) if file else nullcontext():
                client = mlflow.MlflowClient()
                client.get_experiment_by_name(EXPERIMENT)
            self._client = client
        return self._client

    def _attempt(self, consequence: str, steps: Callable[[], None]) -> None:
        """Run ``steps`` unless there is a fault already; a new fault is kept and, the first time, reported. The run goes on."""
        if self.fault is not None:
            return
        try:
            steps()
        except ConfigError:
            raise
        except Exception as error:
            self.fault = f"MLflow at {tracking_uri()}: {consequence}: {explain(error, mlflow.get_tracking_uri())}"
            if not self._warned:
                click.echo(f"warning: {self.fault}. The run goes on, its results are on disk", err=True)
            self._warned = True


def use_tracking_uri(uri: str) -> None:
    """Look for runs at this address instead of ``MLFLOW_TRACKING_URI``."""
    mlflow.set_tracking_uri(uri)


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


def _experiment_id(client: Any, name: str) -> str:
    """Return the id of an experiment, which is created if there is none; another process may create it at the same time."""
    if name.isdigit():
        return name
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id)


def _run_id(run: Any) -> str:
    """Return a run's id, which names its folder; raise ValueError for an id that a broken server has made a path of."""
    run_id = str(run.info.run_id)
    if not is_run_id(run_id):
        raise ValueError(f"{preview(run_id)} was answered as the id of a run")
    return run_id


def _dataset_input(description: Mapping[str, str]) -> DatasetInput:
    dataset = {key: value for key, value in description.items() if key != "context"}
    return DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", description["context"])])


def tracking_uri() -> str:
    """Return the tracking URI without credentials."""
    return redact(mlflow.get_tracking_uri())
