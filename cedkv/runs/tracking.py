"""MLflow: the only file that imports it. Results are on disk before anything here is called with them.

A ``RunManifest`` says what MLflow has to hold of a run; ``MlflowTracker.push`` makes it so, as often as it is called. No call
is waited for longer than ``timeout`` seconds, and after a failed one no other is made until ``retry``: a server that is away
costs a run one wait and one warning, not its results.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import click
import mlflow
import pandas as pd
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from cedkv.core.errors import ConfigError
from cedkv.core.text import preview, redact, sanitize
from cedkv.runs import journal
from cedkv.runs.manifest import LOCK, NAME, NOTE, TABLES, RunManifest, is_run_id, now

T = TypeVar("T")
EXPERIMENT = "cedkv"
ORIGIN, PARENT, RESUMED = "cedkv.origin", "mlflow.parentRunId", "cedkv.resumed"
STAYS = {NAME, LOCK, journal.NAME, TABLES}
"""What of a run's folder is not logged as it stands: bookkeeping, and tables, which go to the run's root."""
_http: dict[str, str] = {}
"""MLflow's HTTP settings that were made here."""
_GENERATED_NAME = re.compile(r"^[a-z]+-[a-z]+-\d+$")


class MlflowTracker:
    """MLflow's side of the runs of one process.

    timeout: seconds a call is waited for. MLflow's own HTTP settings follow it, unless the user has set them: three
        attempts of a quarter each, and the last quarter for the pauses between them.
    fault: why MLflow was given up on; None while it answers.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout
        self.fault: str | None = None
        self._told = False
        self._client: Any = None
        _set_http(timeout)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning of ours, not one for each attempt

    def start(self, manifest: RunManifest) -> None:
        """Take over the run that ``mlflow run`` has made, or make one; without MLflow the run is a local one for now.

        Raises:
            ConfigError: the run to take over was deleted.
        """
        manifest.experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self._attempt("no run could be started", lambda: self._have(manifest, None))
        manifest.run_id = manifest.mlflow_run_id or manifest.origin

    def start_child(self, manifest: RunManifest, parent: RunManifest) -> None:
        """Make the nested run of a condition, or a local one for now."""
        manifest.experiment = parent.experiment
        self._attempt("no nested run could be started", lambda: self._have(manifest, parent))
        manifest.run_id = manifest.mlflow_run_id or manifest.origin

    def reopen(self, manifest: RunManifest, parent: RunManifest | None = None) -> None:
        """Set a run that is resumed RUNNING again, whatever its status.

        Raises:
            ConfigError: this MLflow does not have the run, or has deleted it.
        """
        manifest.status, manifest.end_time, manifest.logged, manifest.known = "RUNNING", None, False, False
        self._attempt("the run could not be opened again", lambda: self._have(manifest, parent))

    def retire(self, manifest: RunManifest) -> None:
        """End the run that ``mlflow run -P resume=...`` has made for itself, with a pointer to the resumed one.

        It stays (``mlflow run`` fails when it is gone), under a name that says what it is.
        """
        made = os.environ.get("MLFLOW_RUN_ID")
        if made and made != manifest.mlflow_run_id:
            self._attempt(f"run {made}, made by mlflow run, was not ended", lambda: self._retire(made, manifest))

    def push(self, manifest: RunManifest, parent: RunManifest | None = None, *, files: bool = False) -> None:
        """Bring MLflow to what the manifest says: parameters, inputs, metrics, tags and, with ``files``, tables and folder.

        An ended run is ended here too: after its files when it is FINISHED, before them when time may be short.
        """
        self._attempt("not everything was logged", lambda: self._push(manifest, parent, files))
        manifest.save()

    def _have(self, manifest: RunManifest, parent: RunManifest | None) -> None:
        """Give the manifest its run in MLflow: the one it has, one that was made for it already, or a new one."""
        if manifest.known:
            return
        if manifest.mlflow_run_id is None:
            experiment = self._ask(lambda client: _experiment(client, manifest.experiment))
            wanted = f"tags.`{ORIGIN}` = '{manifest.origin}'"
            found = self._ask(lambda client: client.search_runs([experiment], wanted, max_results=1))
            if found:
                manifest.mlflow_run_id = _run_id(found[0])
            else:
                above = {} if parent is None else {PARENT: str(parent.mlflow_run_id)}
                tags = {
                    name: redact(value)
                    for name, value in resolve_tags({ORIGIN: manifest.origin, **manifest.tags, **above}).items()
                }
                with _one_attempt(self.timeout):
                    made = self._ask(lambda client: client.create_run(experiment, manifest.start_time, tags, manifest.name))
                manifest.mlflow_run_id, manifest.experiment, manifest.known = _run_id(made), experiment, True
                return
        run_id = manifest.mlflow_run_id
        try:
            info = self._ask(lambda client: client.get_run(run_id)).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(f"run {run_id} is not in MLflow at {_uri()}: set MLFLOW_TRACKING_URI to where it is") from None
        if info.lifecycle_stage == "deleted":
            raise ConfigError(f"run {run_id} was deleted in MLflow; bring it back: mlflow runs restore --run-id {run_id}")
        if info.run_name and not _GENERATED_NAME.match(info.run_name):
            manifest.name = info.run_name  # a name the user chose is left as it is
        self._ask(lambda client: client.update_run(run_id, status=manifest.status, name=manifest.name))
        manifest.experiment, manifest.known = info.experiment_id, True

    def _push(self, manifest: RunManifest, parent: RunManifest | None, files: bool) -> None:
        self._have(manifest, parent)
        run_id = str(manifest.mlflow_run_id)
        inputs = [_input(description) for description in manifest.datasets]
        at = manifest.metrics_at or now()
        metrics = [Metric(name, value, at, 0) for name, value in manifest.metrics.items()]
        params = [Param(name, value) for name, value in manifest.params.items()]
        tags = [RunTag(name, value) for name, value in manifest.tags.items()]
        self._ask(lambda client: client.log_batch(run_id, metrics, params, tags))
        if inputs:
            self._ask(lambda client: client.log_inputs(run_id, datasets=inputs))
        ended = manifest.end_time is not None
        if ended and manifest.status != "FINISHED":
            self._ask(lambda client: client.set_terminated(run_id, manifest.status, manifest.end_time))
        if files:
            self._push_files(manifest, run_id)
        if ended and manifest.status == "FINISHED":
            self._ask(lambda client: client.set_terminated(run_id, manifest.status, manifest.end_time))
        manifest.logged = files and ended

    def _push_files(self, manifest: RunManifest, run_id: str) -> None:
        files = [
            file
            for file in sorted(manifest.folder.rglob("*"))
            if file.is_file() and not file.is_symlink() and file.suffix != ".part"
        ]
        for file in files:
            inside = file.relative_to(manifest.folder)
            if inside.parts[0] not in STAYS:
                self._upload(run_id, file, None if len(inside.parts) == 1 else inside.parent.as_posix())
        tables = [file for file in files if file.parent.name == TABLES]
        for file in tables:
            self._upload(run_id, file, None)
        if tables:  # as mlflow.log_table does, which would append to a table that is there already
            preview = json.dumps([{"path": file.name, "type": "table"} for file in tables])
            self._ask(lambda client: client.set_tag(run_id, "mlflow.loggedArtifacts", preview))

    def _upload(self, run_id: str, file: Path, where: str | None) -> None:
        self._ask(lambda client: client.log_artifact(run_id, str(file), where))

    def _retire(self, made: str, manifest: RunManifest) -> None:
        data = self._ask(lambda client: client.get_run(made)).data
        if data.tags.get("mlflow.source.type") != "PROJECT" or data.metrics:
            return  # not one that mlflow run has just made
        note = f"This run only carried `mlflow run -P resume={manifest.mlflow_run_id}`; the results are in that run."
        tags = {RESUMED: str(manifest.mlflow_run_id), NOTE: note, "mlflow.runName": f"resume of {manifest.name}"}
        self._ask(lambda client: client.log_batch(made, tags=[RunTag(*tag) for tag in tags.items()]))
        self._ask(lambda client: client.set_terminated(made, "FINISHED"))
        click.echo(f"results go to run {manifest.mlflow_run_id}; run {made} only carries the resume", err=True)

    def retry(self) -> None:
        """Try again with a server that was given up on."""
        self.fault = None

    def _ask(self, call: Callable[[Any], T]) -> T:
        """The answer of a call, or its error; TimeoutError when there is none after ``timeout`` seconds."""
        answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answers.put((call(self._open()), None))
            except Exception as error:
                answers.put((None, error))

        Thread(target=answer, daemon=True, name="mlflow").start()
        try:
            found, error = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"no answer within {self.timeout} s (runtime.mlflow_timeout)") from None
        if error is not None:
            raise error
        return found  # type: ignore[return-value]

    def _open(self) -> Any:
        """The client. The first contact makes or upgrades the tables of a local database, which only one process may do."""
        if self._client is None:
            file = mlflow.get_tracking_uri().partition("sqlite:///")[2]
            with FileLock(f"{file}.lock", timeout=self.timeout) if file else nullcontext():
                client = mlflow.MlflowClient()
                client.get_experiment_by_name(EXPERIMENT)
            self._client = client
        return self._client

    def _attempt(self, consequence: str, steps: Callable[[], None]) -> None:
        """Take steps, unless there was a fault before; the first fault is told, and the run goes on."""
        if self.fault is not None:
            return
        try:
            steps()
        except ConfigError:
            raise
        except Exception as error:
            self.fault = f"MLflow at {_uri()}: {consequence}: {sanitize(' '.join(str(error).split()))[:400]}"
            if not self._told:
                click.echo(f"warning: {self.fault}. The run goes on, its results are on disk", err=True)
            self._told = True


def _set_http(timeout: int) -> None:
    """Set MLflow's HTTP client to give up within ``timeout`` seconds; what the user has set stays."""
    settings = {"TIMEOUT": max(1, timeout // 4), "MAX_RETRIES": 2, "BACKOFF_FACTOR": max(1, timeout // 16),
                "BACKOFF_JITTER": timeout / 32}  # fmt: skip
    for name, value in settings.items():
        full = f"MLFLOW_HTTP_REQUEST_{name}"
        if full not in os.environ or os.environ[full] == _http.get(full):
            os.environ[full] = _http[full] = str(value)


@contextmanager
def _one_attempt(timeout: int) -> Iterator[None]:
    """For what must not be asked for twice: a server that is slow, not dead, makes a run for every attempt. An answer that is
    lost is no harm, because a run is found again by its origin."""
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def describe_datasets(tables: Mapping[str, tuple[str, pd.DataFrame]]) -> list[dict[str, str]]:
    """Return MLflow's descriptions of the samples, each with its digest and ``context``.

    Args:
        tables: context (on, off) -> where the samples come from, and the samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on schema inference, which is not used
        return [
            {"context": context, **mlflow.data.from_pandas(table, name=redact(source)[:500]).to_dict()}
            for context, (source, table) in tables.items()
        ]


def where_to_look(manifest: RunManifest) -> str:
    """How to open the UI on the store that was used."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        return f"{_uri()}/#/experiments/{manifest.experiment}/runs/{manifest.mlflow_run_id}"
    return "mlflow ui --host 127.0.0.1   (in this folder), then http://127.0.0.1:5000"


def compare_view(manifest: RunManifest, mode: str) -> str:
    """The UI's page that compares the nested runs of a run: ``CHART`` a bar chart a metric, ``ARTIFACT`` tables side by side.

    Sorted by a metric, because the UI hides nested runs below their parent while runs are sorted by time.
    """
    server = _uri() if mlflow.get_tracking_uri().startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    asked = {
        "compareRunsMode": mode, "searchFilter": f"tags.`mlflow.parentRunId` = '{manifest.mlflow_run_id}'",
        "orderByKey": "metrics.`phase2_rel_kl_to_teacher_select`", "orderByAsc": "true",
    }  # fmt: skip
    return f"{server}/#/experiments/{manifest.experiment}/runs?{urlencode(asked, quote_via=quote)}"


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment, made if there is none; another process may make it at the same time."""
    if name.isdigit():
        return name
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _run_id(run: Any) -> str:
    """A run's id, which names its folder: not one that a broken or hostile server makes a path of. Raises ValueError."""
    found = str(run.info.run_id)
    if not is_run_id(found):
        raise ValueError(f"{preview(found)} was answered as the id of a run")
    return found


def _input(description: Mapping[str, str]) -> DatasetInput:
    known = {key: value for key, value in description.items() if key != "context"}
    return DatasetInput(Dataset(**known), [InputTag("mlflow.data.context", description["context"])])


def _uri() -> str:
    return redact(mlflow.get_tracking_uri())
