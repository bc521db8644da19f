"""A real ``mlflow server``, on sqlite and on PostgreSQL, that dies, freezes, comes back, and has many runs at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
import pytest

from cedkv.core.errors import ConfigError, TrackingError
from cedkv.runs import connection
from cedkv.runs.lifecycle import ActiveRun, sync
from cedkv.runs.manifest import load_manifest
from cedkv.runs.publish import save_table
from cedkv.runs.timeouts import call_with_timeout
from cedkv.runs.tracking import describe_datasets
from tests.support import tiny
from tests.support.crashing import forked, impatient, run_of_nothing
from tests.support.serving import NO_POSTGRES, WITHOUT_POSTGRES, Server, mlflow_server, postgres, rejecting
from tests.support.waiting import no_hang

SAMPLES = pd.DataFrame([{"sample_id": "on-1", "query_text": "Word: dax"}])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("sqlite", marks=pytest.mark.server),
        pytest.param(
            "postgresql",
            marks=[
                pytest.mark.server,
                pytest.mark.slow,
                pytest.mark.skipif(NO_POSTGRES, reason=WITHOUT_POSTGRES),
            ],
        ),
    ],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    # The database's folder is not pytest's, which shuts everybody else out of its own (whenever another session starts).
    with (
        TemporaryDirectory(prefix="cedkv-postgres-") as own,
        _postgresql(Path(own)) if request.param == "postgresql" else _sqlite(folder) as store,
    ):
        made = mlflow_server(folder, store)
        made.start()
        yield made
        made.kill()


@contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    with postgres(folder, "planted-password") as address:
        yield f"postgresql+psycopg2://mlflow:planted-password@{address}/mlflow"


@contextmanager
def _sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def uri(server: Server, store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs go to the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    mlflow.set_tracking_uri(server.uri)
    return server.uri


def fill(job: ActiveRun) -> None:
    """Results of every kind."""
    job.manifest.datasets = describe_datasets({"on": ("own.jsonl", SAMPLES)})
    (job.folder / "artifacts").mkdir()
    (job.folder / "artifacts" / "x.json").write_text("{}")
    save_table(job.manifest, "on.json", SAMPLES)
    job.manifest.set_results({"gain": 0.5}, {"gateA": "pass"}, "text")


def is_whole(run_id: str) -> None:
    """MLflow has everything ``fill`` makes, once."""
    run, client = mlflow.get_run(run_id), mlflow.MlflowClient()
    assert (run.info.status, run.data.metrics, run.data.tags["gateA"]) == ("FINISHED", {"gain": 0.5}, "pass")
    assert run.data.params["phase2.seed"] == "42"
    assert len(client.get_metric_history(run_id, "gain")) == 1
    assert [(i.dataset.name, i.tags[0].value) for i in run.inputs.dataset_inputs] == [("own.jsonl", "on")]
    assert {item.path for item in client.list_artifacts(run_id)} == {"artifacts", "config.yaml", "on.json"}


def test_server_that_dies_under_a_run_and_comes_back(server: Server, uri: str) -> None:
    """Results are on disk, the run is told to be unlogged, and sync brings all of it, as often as it is called."""
    with pytest.raises(TrackingError, match=r"the results are safe in outputs/.*\n.*cedkv sync"), run_of_nothing() as job:  # noqa: PT012
        fill(job)
        server.kill()
        impatient(job)
        with no_hang():
            job.push()
            job.finish(job.manifest)
    with pytest.raises(TrackingError, match="safe"):
        sync(job.folder, 1, lambda _: None)
    server.start()
    assert mlflow.get_run(job.manifest.run_id).info.status == "RUNNING"
    for _ in range(2):
        sync(job.folder, 60, lambda _: None)
        is_whole(job.manifest.run_id)


def test_server_that_dies_between_two_calls_of_logging(server: Server, uri: str) -> None:
    """A part is there already; the rest is added to it."""
    real = mlflow.MlflowClient.log_artifact
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrackingError), run_of_nothing() as job:  # noqa: PT012
        fill(job)
        patch.setattr(mlflow.MlflowClient, "log_artifact", lambda *given: (server.kill(), real(*given)))
        job.finish(job.manifest)
    server.start()
    assert mlflow.get_run(job.manifest.run_id).data.metrics == {"gain": 0.5}
    sync(job.folder, 60, lambda _: None)
    is_whole(job.manifest.run_id)


def test_server_that_freezes(server: Server, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers: every wait ends, and after the first nothing is asked until the end."""
    waits: list[int] = []

    def counted(call: Callable[[], Any], timeout: int) -> Any:
        waits.append(timeout)
        return call_with_timeout(call, timeout)

    with pytest.raises(TrackingError), run_of_nothing() as job:  # noqa: PT012
        fill(job)
        server.signal(signal.SIGSTOP)
        try:
            timeout = impatient(job)
            monkeypatch.setattr(connection, "call_with_timeout", counted)
            with no_hang():
                for _ in range(5):
                    job.push()
                assert waits == [timeout]
                job.finish(job.manifest)
            assert waits == [timeout] * 2
        finally:
            server.signal(signal.SIGCONT)
    sync(job.folder, 60, lambda _: None)
    is_whole(job.manifest.run_id)


def test_server_that_was_away_at_the_start_and_is_back_at_the_end(server: Server, uri: str) -> None:
    """The run has an id of its own on disk, and is logged without anybody's help."""
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with run_of_nothing() as job:
        mlflow.set_tracking_uri(uri)
        fill(job)
        job.finish(job.manifest)
    assert job.manifest.run_id.startswith("local-")
    is_whole(str(load_manifest(job.folder).mlflow_run_id))


def test_eight_runs_at_once(server: Server, uri: str) -> None:
    def one() -> None:
        with run_of_nothing(tiny.config("x"), name="at once") as job:
            fill(job)
            job.finish(job.manifest)

    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            os._exit(forked(one))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    for folder in Path("outputs").iterdir():
        is_whole(folder.name)
    runs = mlflow.search_runs(experiment_names=["cedkv"], filter_string="attributes.run_name = 'at once'", output_format="list")
    assert {run.info.run_id for run in runs} == {folder.name for folder in Path("outputs").iterdir()}
    assert len(runs) == 8


@pytest.mark.parametrize("status", [500, 401, 403, 404])
def test_server_that_says_no(store: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken inside, or access denied: the run goes on, one warning says what was answered."""
    with rejecting(status) as uri:
        mlflow.set_tracking_uri(uri)
        its = tiny.config("x", "runtime.mlflow_timeout=16")
        with no_hang(), pytest.raises(TrackingError, match="the results are safe"), run_of_nothing(its) as job:  # noqa: PT012
            fill(job)
            job.finish(job.manifest)
    told = capsys.readouterr().err
    assert told.count("warning:") == 1
    assert str(status) in told


def test_what_a_server_does_not_have_is_rejected_by_name(server: Server, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are other errors than those of a database. A lost run is logged as a new one."""
    for name, value in (("MLFLOW_RUN_ID", "f" * 32), ("MLFLOW_EXPERIMENT_ID", "987654"), ("MLFLOW_EXPERIMENT_ID", "a name")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=rf"^{name} = '?{value}'?: .*unset"), run_of_nothing():
                pytest.fail("the run was started")
    with run_of_nothing() as job:
        fill(job)
        job.finish(job.manifest)
    mlflow.delete_run(job.manifest.run_id)
    with pytest.raises(ConfigError, match=r"was deleted in MLflow; bring it back: .* --experiment NAME"):
        sync(job.folder, 60, lambda _: None)
    for _ in range(2):
        sync(job.folder, 60, lambda _: None, "2024")
    (found,) = mlflow.search_runs(experiment_names=["2024"], output_format="list")
    is_whole(found.info.run_id)
