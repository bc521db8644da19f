"""MLflow: the only file that imports it. Results are on disk before anything here is called with them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import mlflow
import pandas as pd
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis
from sqlalchemy.exc import SQLAlchemyError

from cedkv.config import Phase2Config
from cedkv.errors import TrackingError

EXPERIMENT = "cedkv"
_GENERATED_NAME = re.compile(r"^[a-z]+-[a-z]+-\d+$")
_FAULTS = (MlflowException, OSError, ImportError, SQLAlchemyError)  # the last two: a missing driver, an unreadable database
_TAKES_OVER = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")


@contextmanager
def tracked_run(name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A run, by id: the one ``mlflow run`` has made, or a new one in the experiment ``cedkv``.

    An exception inside ends it as FAILED with what it had. A name the user chose is left as it is.

    Raises:
        TrackingError: the tracking store cannot be used.
    """
    with _readable("no run could be started"):
        if not any(os.environ.get(variable) for variable in _TAKES_OVER):
            mlflow.set_experiment(EXPERIMENT)
        taken_over = bool(os.environ.get("MLFLOW_RUN_ID"))
        run = mlflow.start_run(run_name=None if taken_over else name)
        if taken_over and _GENERATED_NAME.match(run.info.run_name or ""):
            mlflow.set_tag("mlflow.runName", name)
        mlflow.set_tags(dict(tags))
    try:
        yield run.info.run_id
    except BaseException:
        with suppress(*_FAULTS):  # what was raised says more than that its end could not be recorded either
            mlflow.end_run("FAILED")
        raise
    with _readable("the end of the run was not recorded"):
        mlflow.end_run()


def create_child(name: str, tags: Mapping[str, str]) -> str:
    """A nested run under the active one, RUNNING until ``child_run`` or ``end_children`` ends it; returns its id."""
    with _readable("no nested run could be started"):
        parent = mlflow.active_run()
        run = mlflow.MlflowClient().create_run(
            parent.info.experiment_id, run_name=name, tags={**tags, "mlflow.parentRunId": parent.info.run_id}
        )
    return str(run.info.run_id)


@contextmanager
def child_run(run_id: str) -> Iterator[None]:
    """Make a nested run the active one, and end it when the block ends."""
    with _readable("a nested run could not be opened"):
        run = mlflow.start_run(run_id=run_id, nested=True)
    with run:
        yield


def end_children(run_ids: Iterable[str]) -> None:
    """After a crash: nested runs that are still RUNNING become FAILED."""
    with suppress(*_FAULTS):
        client = mlflow.MlflowClient()
        for run_id in run_ids:
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "FAILED")


def log_config(config: Phase2Config) -> None:
    """The resolved configuration as parameters under its dotted names."""
    params = [Param(key, _text(value)[:6000]) for key, value in config.dotted().items()]
    with _readable("the parameters were not logged"):
        mlflow.MlflowClient().log_batch(_run_id(), params=params)


def log_datasets(sources: Mapping[str, tuple[str, pd.DataFrame]]) -> None:
    """Dataset inputs: context (on, off) -> (where from, its samples); MLflow makes a digest of each."""
    with _readable("the datasets were not logged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on schema inference, which is not used
        for context, (source, samples) in sources.items():
            mlflow.log_input(mlflow.data.from_pandas(samples, name=source[:500]), context=context)


def log_results(
    metrics: Mapping[str, float | None],
    tags: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame],
    description: str,
    folder: Path,
) -> None:
    """Everything a finished run has: one batch of metrics and tags, the tables at the run's root, the output folder."""
    now = get_current_time_millis()
    values = [Metric(name, value, now, 0) for name, value in metrics.items() if value is not None]
    labels = [RunTag(name, value) for name, value in {**tags, "mlflow.note.content": description}.items()]
    with _readable(f"the results are safe in {folder}, but were not (all) logged"):
        mlflow.MlflowClient().log_batch(_run_id(), metrics=values, tags=labels)
        for name, table in tables.items():
            mlflow.log_table(table, artifact_file=name)
        mlflow.log_artifacts(str(folder))


def log_partial(folder: Path) -> None:
    """After a crash: keep the files there are, and do not hide the crash behind a second error."""
    try:
        mlflow.log_artifacts(str(folder))
    except _FAULTS:
        warnings.warn(f"the files of the failed run are in {folder}; they could not be logged", stacklevel=2)


def where_to_look() -> str:
    """How to open the UI on the store that was used."""
    uri = mlflow.get_tracking_uri()
    run = mlflow.active_run()
    if uri.startswith(("http://", "https://")) and run is not None:
        return f"{_without_credentials(uri)}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return "mlflow ui --host 127.0.0.1   (in this folder), then http://127.0.0.1:5000"


def compare_view(run_id: str, mode: str) -> str:
    """The UI's page that compares the nested runs of a run: ``CHART`` a bar chart a metric, ``ARTIFACT`` tables side by side.

    Sorted by a metric, because the UI hides nested runs below their parent while runs are sorted by time.
    """
    uri = mlflow.get_tracking_uri()
    server = _without_credentials(uri) if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    with _readable("the run was not found"):
        experiment = mlflow.get_run(run_id).info.experiment_id
    asked = {
        "compareRunsMode": mode, "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": "metrics.`phase2_rel_kl_to_teacher_select`", "orderByAsc": "true",
    }  # fmt: skip
    return f"{server}/#/experiments/{experiment}/runs?{urlencode(asked, quote_via=quote)}"


def _run_id() -> str:
    run = mlflow.active_run()
    if run is None:
        raise RuntimeError("no active run")
    return str(run.info.run_id)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _without_credentials(text: str) -> str:
    """The text with ``user:password@`` taken out of every URI in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


@contextmanager
def _readable(consequence: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        cause = _without_credentials(" ".join(str(error).split()))[:400]
        uri = _without_credentials(mlflow.get_tracking_uri())
        raise TrackingError(f"MLflow at {uri}: {consequence}: {cause}\nCheck MLFLOW_TRACKING_URI and the server") from error
