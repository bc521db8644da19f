"""The MLflow server of compose.yaml, on PostgreSQL and an S3 store: eight drivers at once, a restart under them, no secrets."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

import cedkv
from cedkv.__main__ import script
from cedkv.config.resolve import to_yaml
from cedkv.runs.connection import CLIENT_SETTINGS
from cedkv.runs.manifest import load_manifest
from tests.support import crashing
from tests.support.compose import NO_S3, SETTINGS, SharedServer, shared_server
from tests.support.crashing import forked
from tests.support.serving import NO_POSTGRES, WITHOUT_POSTGRES
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(NO_POSTGRES, reason=WITHOUT_POSTGRES),
    pytest.mark.skipif(NO_S3, reason="needs boto3 and nanio (pip), an S3 store; runs where they are"),
]
DRIVERS = 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    with shared_server(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture
def experiment(shared: SharedServer, store: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An experiment that nobody has made yet; runs go to it, at the shared server."""
    name = request.node.name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared.mlflow.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    mlflow.set_tracking_uri(shared.mlflow.uri)
    return name


def start(*arguments: str) -> int:
    """The command line in a process of its own, a driver; its process id."""
    child = os.fork()
    if child == 0:
        sys.argv = ["cedkv", *arguments]
        os._exit(forked(script))
    return child


def codes(children: Sequence[int]) -> list[int]:
    """Exit codes of the drivers, when they have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def drivers(model: Path, *overrides: str) -> list[int]:
    """Eight drivers at once, each with a seed of its own; their process ids."""
    children = []
    for seed in range(DRIVERS):
        config = Path(f"seed-{seed}.yaml")
        config.write_text(to_yaml(crashing.config(model, f"seed={seed}", *overrides)))
        children.append(start("--config", str(config)))
    return children


def runs(experiment: str) -> dict[str, Run]:
    return {run.info.run_id: run for run in mlflow.search_runs(experiment_names=[experiment], output_format="list")}


def lost(run: Run, folder: Path, into: Path) -> list[str]:
    """What MLflow does not have of a run's folder, or has otherwise."""
    manifest = load_manifest(folder)
    here = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(into / run.info.run_id)))
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    logged = [path for path in files if path.parts[0] not in ("run.json", "run.lock", "journal.jsonl", "tables")]
    wrong = [str(path) for path in logged if (here / path).read_bytes() != (folder / path).read_bytes()]
    wrong += [path.name for path in (folder / "tables").iterdir() if (here / path.name).read_bytes() != path.read_bytes()]
    return [
        *wrong,
        *(name for name, value in manifest.metrics.items() if run.data.metrics.get(name) != value),
        *(name for name, value in manifest.params.items() if run.data.params.get(name) != value),
        *(["status"] if run.info.status != "FINISHED" else []),
    ]


@pytest.fixture
def planted(experiment: str, shared: SharedServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Secrets of a driver, each with the word ``planted`` in it; those of the servers have it too. The experiment."""
    uri = shared.mlflow.uri.replace("://", "://ann:planted%2Fpass@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-password")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-token")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", shared.s3.uri.replace("://", "://key:planted-in-uri@"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SETTINGS["S3_ACCESS_KEY"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-wrong-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-session")
    mlflow.set_tracking_uri(uri)
    return experiment


def secrets_in(shared: SharedServer, console: str) -> list[str]:
    """Where a secret is: a file of a run, what was printed, MLflow's database, an artifact, the server's log."""
    kept = [path for folder in (Path("outputs"), shared.artifacts) for path in folder.rglob("*") if path.is_file()]
    texts = {"console": console, "database": shared.dump(), "log of the server": shared.mlflow.log}
    return [
        *(name for name, text in texts.items() if "planted" in text),
        *(str(path) for path in kept if b"planted" in path.read_bytes()),
    ]


def test_eight_drivers_at_once_lose_nothing_and_tell_no_secret(
    shared: SharedServer,
    planted: str,
    llama_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All eight meet an experiment that is not there, and what MLflow has at the end is what the folders have.

    It is read through the server: MLflow's client would ask the S3 store for files, by signed addresses that only the server
    can reach.
    """
    assert codes(drivers(llama_folder)) == [0] * DRIVERS
    assert secrets_in(shared, "".join(capfd.readouterr())) == []
    found = runs(planted)
    assert set(found) == {folder.name for folder in Path("outputs").iterdir()}
    assert sorted(run.data.params["phase2.seed"] for run in found.values()) == [str(seed) for seed in range(DRIVERS)]
    for setting in CLIENT_SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    here = cedkv.read_run(min(found))
    Path("outputs").rename("moved")
    there = cedkv.read_run(min(found))
    assert there.metrics == here.metrics
    assert len(there.on) == 11
    for run_id, run in found.items():
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert lost(run, Path("moved") / run_id, tmp_path) == []
    assert "X-Amz-Signature" not in shared.s3.log


@pytest.mark.slow
def test_a_server_that_is_restarted_under_eight_drivers(
    shared: SharedServer, experiment: str, llama_folder: Path, tmp_path: Path
) -> None:
    """Each driver waits, or ends with exit code 4 and a folder that sync logs: nothing is lost, and no run is there twice."""
    children = drivers(llama_folder, "runtime.mlflow_timeout=16")
    wait_until(lambda: list(Path().glob("outputs/*/journal.jsonl")), "a run has begun")
    shared.mlflow.kill()
    time.sleep(2)
    shared.mlflow.start()
    ended = codes(children)
    assert set(ended) <= {0, 4}
    for folder in Path("outputs").iterdir():
        if not load_manifest(folder).logged:
            assert codes([start("sync", str(folder))]) == [0]
    found = runs(experiment)
    folders = {load_manifest(folder).mlflow_run_id: folder for folder in Path("outputs").iterdir()}
    assert len(folders) == DRIVERS
    assert set(found) == set(folders)
    for run_id, run in found.items():
        assert lost(run, folders[run_id], tmp_path) == []


@pytest.mark.parametrize("fault", ["away", "rejects the key"])
def test_no_secret_gets_out_with_an_error_of_the_store(
    shared: SharedServer, planted: str, fault: str, llama_folder: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The S3 store is away, or the driver writes to it by itself, with a wrong key: exit code 4, and sync brings the rest."""
    Path("config.yaml").write_text(to_yaml(crashing.config(llama_folder, "runtime.mlflow_timeout=8")))
    if fault == "away":
        shared.s3.kill()
    else:
        mlflow.create_experiment(planted, artifact_location="s3://mlflow/direct")
    try:
        assert codes([start("--config", "config.yaml")]) == [4]
    finally:
        if fault == "away":
            shared.s3.start()
    assert [run.info.status for run in runs(planted).values()] == ["RUNNING"]
    for name in ("AWS_SESSION_TOKEN", "MLFLOW_S3_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", shared.s3.uri)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SETTINGS["S3_SECRET_KEY"])
    (folder,) = Path("outputs").iterdir()
    assert codes([start("sync", str(folder))]) == [0]
    assert [run.info.status for run in runs(planted).values()] == ["FINISHED"]
    assert secrets_in(shared, "".join(capfd.readouterr())) == []
