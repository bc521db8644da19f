"""A store that cannot be used: the run goes on, says so once, keeps its results, and is logged later."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner

from cedkv.cli import app
from cedkv.core.errors import RunInterrupted, TrackingError
from cedkv.runs.lifecycle import sync
from cedkv.runs.manifest import RunManifest, load_manifest
from cedkv.runs.tracking import MlflowTracker
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import n_runs
from tests.support.crashing import run_of_nothing as run
from tests.support.serving import Answer, answering
from tests.support.waiting import HANGING, no_hang


@pytest.fixture
def unreachable_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize("user", ["user:secret@", "user:s%40cret@", "user:p@cret@", "cret@"])
def test_a_server_that_is_not_there_costs_one_warning(
    unreachable_store: None, user: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing listens on port 9: the run goes on under an id of its own, and all results are kept. Neither our words
    nor MLflow's own, which quote the address in full, show credentials."""
    mlflow.set_tracking_uri(f"http://{user}127.0.0.1:9")
    with pytest.raises(TrackingError) as caught, run() as job:  # noqa: PT012
        assert re.fullmatch(r"local-[0-9a-f]{32}", job.manifest.run_id)
        job.push()
        job.push()
        job.finish(job.manifest)
    told = capsys.readouterr().err
    assert told.count("warning: MLflow at http://127.0.0.1:9: no run could be started: ") == told.count("warning") == 1
    assert f"the results are safe in outputs/{job.manifest.run_id}" in str(caught.value)
    assert f"python -m cedkv sync outputs/{job.manifest.run_id}" in str(caught.value)
    kept = "".join(path.read_text() for path in job.folder.iterdir())
    assert not [word for word in ("cret", "user:") if word in told + str(caught.value) + kept]


def test_a_local_run_is_logged_later_as_one_run(store: str, unreachable_store: None) -> None:
    """Under an id that MLflow gives it, once, however often it is tried; and found again when MLflow's answer was lost."""
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(TrackingError), run() as job:  # noqa: PT012
        job.manifest.set_results({"gain": 0.5}, {"gateA": "pass"}, "text")
        job.finish(job.manifest)
    mlflow.set_tracking_uri(store)
    before = n_runs()
    found = []
    for lost in (False, False, True):
        if lost:
            entry = load_manifest(job.folder)
            entry.mlflow_run_id = None
            entry.save()
        sync(job.folder, 10, found.append)
    assert n_runs() == before + 1
    assert len(set(found)) == 1
    logged = mlflow.get_run(str(load_manifest(job.folder).mlflow_run_id))
    assert (logged.info.status, logged.data.metrics, logged.data.tags["gateA"]) == ("FINISHED", {"gain": 0.5}, "pass")
    assert logged.info.start_time == job.manifest.start_time


def test_sync_in_the_folder_of_the_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with run() as job:
        job.finish(job.manifest)
    monkeypatch.chdir(job.folder)
    done = CliRunner().invoke(app.main, ["sync", "."])
    assert (done.exit_code, done.output) == (0, f"{job.manifest.run_id}: logged as run {job.manifest.run_id}, FINISHED\n")


def test_a_missing_driver(store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    mlflow.set_tracking_uri("mysql+pymysql://user:secret@127.0.0.1:9/db")
    with pytest.raises(TrackingError, match="the results are safe"), run() as job:
        job.finish(job.manifest)
    told = capsys.readouterr().err
    assert "no run could be started: " in told
    assert "pymysql" in told
    assert "secret" not in told


def test_a_call_without_an_answer_is_waited_for_no_longer_than_told(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hangs (a database, a name server, a mount): after the first wait nothing is asked any more."""
    asked = []

    def hangs(*_: Any, **__: Any) -> None:
        asked.append(1)
        time.sleep(HANGING)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", hangs)
    tracker, entry = MlflowTracker(4), RunManifest("phase2", "2", "n")
    tracker.timeout = 0.3  # type: ignore[assignment]
    with no_hang():
        tracker.start(entry)
        entry.write(tiny.config("x"))
        for _ in range(5):
            tracker.push(entry, files=True)
    assert len(asked) == 1
    assert tracker.fault is not None
    assert "no answer within 0.3 s (runtime.mlflow_timeout)" in tracker.fault


EXPERIMENT = {"experiment": {"experiment_id": "1", "name": "cedkv", "lifecycle_stage": "active"}}


def as_run(run_id: str) -> dict[str, Any]:
    return {"run": {"info": {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1"}, "data": {}}}


def as_json(answer: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def test_a_server_that_is_slow_to_make_a_run_makes_one(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than MLflow's client waits for an answer (a quarter of the timeout): it would ask for a second and a third run,
    and those would be RUNNING for ever."""
    asked = []

    def answer(path: str) -> Answer:
        asked.append(path.rsplit("/", 1)[-1])
        if asked[-1] == "create":
            time.sleep(3)
        return as_json(EXPERIMENT if "get-by-name" in path else as_run("a") if asked[-1] == "create" else {})

    points.MLFLOW_HTTP_SETTINGS.replace({}, monkeypatch)
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    with answering(answer) as uri:
        mlflow.set_tracking_uri(uri)
        tracker, entry = MlflowTracker(10), RunManifest("phase2", "2", "n")
        tracker.start(entry)
    assert asked.count("create") == 1
    assert (tracker.fault, entry.run_id) == (None, "a")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"


@pytest.mark.parametrize("run_id", ["../../x", "/etc", "", "a b", "."])
def test_a_server_that_answers_with_a_path_for_a_run_names_no_folder(
    store: str, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(lambda path: as_json(EXPERIMENT if "get-by-name" in path else as_run(run_id))) as uri:
        mlflow.set_tracking_uri(uri)
        tracker, entry = MlflowTracker(60), RunManifest("phase2", "2", "n")
        tracker.start(entry)
    assert entry.run_id == entry.origin
    assert f"{run_id!r} was answered as the id of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Type": "text/html"}, b"<html>Log in</html>"),
        (200, {"Content-Length": "1000"}, b'{"experiment": '),
        (302, {"Location": "/elsewhere"}, b""),
        (503, {"Retry-After": "86400"}, b"later"),
        pytest.param((429, {"Retry-After": "86400"}, b"later"), marks=pytest.mark.slow),
        (204, {}, b""),
    ],
    ids=["login page", "cut off", "redirects in a circle", "503 until tomorrow", "429 until tomorrow", "nothing"],
)
def test_a_server_with_other_answers(store: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    """No answer of a server ends a run, or holds it longer than told."""
    with no_hang(), answering(lambda _: answer) as uri:
        mlflow.set_tracking_uri(uri)
        with (
            pytest.raises(TrackingError, match="the results are safe"),
            run(tiny.config("x", "runtime.mlflow_timeout=4")) as job,
        ):
            job.finish(job.manifest)
    assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize(
    "make", [lambda path: path.touch(), lambda path: path.symlink_to(path), lambda path: path.symlink_to("/a/b")]
)
def test_outputs_that_cannot_be_written_are_seen_before_a_run_is_made(store: str, make: Callable[[Path], None]) -> None:
    make(Path("outputs"))
    before = n_runs()
    with (
        pytest.raises(
            RunInterrupted, match=r"outputs cannot be written: .*; put a folder in its place, or set CEDKV_OUTPUTS to"
        ),
        run(),
    ):
        raise AssertionError
    assert n_runs() == before


def test_http_settings_follow_the_patience_and_the_users_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    points.MLFLOW_HTTP_SETTINGS.replace({}, monkeypatch)
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    for timeout, pause in ((60, "3"), (16, "1")):
        MlflowTracker(timeout)
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
        assert os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"] == pause
    for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
