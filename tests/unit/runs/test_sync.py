"""``sync --experiment``: a folder is logged as a new run, whatever became in MLflow of the run that it was logged as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.tracking._tracking_service.utils import _get_store

from cedkv.cli import app
from cedkv.core.errors import ConfigError, TrackingError
from cedkv.runs.lifecycle import sync
from cedkv.runs.manifest import MERGED_FROM, RunManifest, load_manifest
from tests.support import tiny
from tests.support.crashing import run_of_nothing as run

CLIENT = mlflow.MlflowClient


def in_experiment(name: str) -> list[Any]:
    """All runs of an experiment that are not deleted."""
    return mlflow.search_runs(experiment_names=[name], output_format="list")


def finished(**tags: str) -> RunManifest:
    """A finished run with a metric and a file."""
    with run(name="ours") as job:
        (job.folder / "report.html").write_text("page")
        job.manifest.set_results({"gain": 0.5}, {"gateA": "pass", **tags}, "[page](report.html)")
        job.finish(job.manifest)
    return job.manifest


def delete(manifest: RunManifest) -> None:
    CLIENT().delete_run(str(manifest.mlflow_run_id))


def collect_garbage(manifest: RunManifest) -> None:
    """What ``mlflow gc`` does with a deleted run."""
    delete(manifest)
    _get_store()._hard_delete_run(str(manifest.mlflow_run_id))


def delete_experiment(manifest: RunManifest) -> None:
    CLIENT().delete_experiment(str(manifest.experiment_id))


@pytest.fixture
def _experiment_of_its_own(store: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)


@pytest.mark.usefixtures("_experiment_of_its_own")
@pytest.mark.parametrize("lose", [delete, collect_garbage, delete_experiment])
@pytest.mark.parametrize("merged", [False, True])
def test_a_lost_run_is_logged_as_a_new_one(
    lose: Callable[[RunManifest], None], merged: bool, request: pytest.FixtureRequest
) -> None:
    """Once, however often it is asked for. The error of a plain sync names the way, and changes nothing."""
    manifest = finished(**{MERGED_FROM: "a1, b2"} if merged else {})
    first = mlflow.get_run(manifest.run_id)
    lose(manifest)
    stored = (manifest.folder / "run.json").read_bytes()
    command = f"python -m cedkv sync {manifest.folder} --experiment NAME"
    with pytest.raises(ConfigError, match=rf"^run {manifest.run_id} .*; or log the folder as a new run: {command}$"):
        sync(manifest.folder, 10, lambda _: None)
    assert (manifest.folder / "run.json").read_bytes() == stored
    other = f"again, {request.node.name}"
    for _ in range(2):
        done = CliRunner().invoke(app.main, ["sync", str(manifest.folder), "--experiment", other])
        assert (done.exit_code, done.exception) == (0, None)
    (found,) = in_experiment(other)
    assert done.output == f"{manifest.run_id}: logged as run {found.info.run_id}, FINISHED\n"
    assert found.info.run_id != manifest.run_id
    assert (found.info.run_name, found.info.status, found.info.start_time) == ("ours", "FINISHED", first.info.start_time)
    assert (found.data.params, found.data.metrics) == (first.data.params, first.data.metrics)
    assert found.data.tags["mlflow.note.content"] == (
        f"[page](#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}/artifacts/report.html)"
    )
    assert found.data.tags.get(MERGED_FROM) == ("a1, b2" if merged else None)
    assert {item.path for item in CLIENT().list_artifacts(found.info.run_id)} == {"config.yaml", "report.html"}
    sync(manifest.folder, 10, lambda _: None)  # from now on it is that run
    assert [each.info.run_id for each in in_experiment(other)] == [found.info.run_id]


def finished_comparison() -> RunManifest:
    """Two nested runs, the second of which is the best."""
    with run(name="parent") as job:
        for key in ("a", "b"):
            child = job.child(key, f"condition {key}", tiny.config("x"), {"condition": key})
            child.set_results({"gain": 0.5}, {}, "text")
            job.finish(child)
        job.manifest.set_results({}, {"best.run_id": child.run_id}, "text")
        job.finish(job.manifest)
    return job.manifest


def assert_whole(runs: list[Any]) -> None:
    """A parent and its two nested runs, each logged to its end."""
    by_name = {each.info.run_name: each for each in runs}
    assert sorted(by_name) == ["condition a", "condition b", "parent"]
    assert len(runs) == 3
    parent = by_name["parent"]
    assert parent.data.tags["best.run_id"] == by_name["condition b"].info.run_id
    for key in ("a", "b"):
        child = by_name[f"condition {key}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.info.status, child.data.metrics) == ("FINISHED", {"gain": 0.5})


@pytest.mark.usefixtures("_experiment_of_its_own")
def test_a_comparison_is_logged_with_its_conditions(request: pytest.FixtureRequest) -> None:
    manifest = finished_comparison()
    assert_whole(in_experiment(request.node.name))
    delete_experiment(manifest)
    with pytest.raises(ConfigError, match="deleted in MLflow with its experiment; bring both back: mlflow experiments restore"):
        sync(manifest.folder, 10, lambda _: None)
    sync(manifest.folder, 10, lambda _: None, "comparisons")
    assert_whole(in_experiment("comparisons"))


@pytest.mark.usefixtures("_experiment_of_its_own")
def test_a_nested_run_that_is_lost_is_made_again_under_its_parent(request: pytest.FixtureRequest) -> None:
    """In the same experiment the runs that are still there are completed, not made twice."""
    manifest = finished_comparison()
    delete(load_manifest(manifest.folder.parent / manifest.children["b"]))
    with pytest.raises(ConfigError, match=rf"cedkv sync {manifest.folder} --experiment NAME"):
        sync(manifest.folder, 10, lambda _: None)
    sync(manifest.folder, 10, lambda _: None, request.node.name)
    runs = in_experiment(request.node.name)
    assert_whole(runs)
    assert manifest.run_id in {each.info.run_id for each in runs}


@pytest.mark.usefixtures("_experiment_of_its_own")
def test_an_experiment_that_is_lost_under_a_run_ends_with_the_way_to_log_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results count: no exit code of bad input, and no status FAILED."""
    with pytest.raises(TrackingError, match=r"the results are safe in .*\n.*--experiment NAME"), run() as job:  # noqa: PT012
        delete_experiment(job.manifest)
        job.finish(job.child("a", "condition a", tiny.config("x"), {}))
        job.manifest.set_results({"gain": 0.5}, {}, "text")
        job.finish(job.manifest)
    assert load_manifest(job.folder).status == "FINISHED"
    sync(job.folder, 10, lambda _: None, "rescued")
    assert sorted(each.info.status for each in in_experiment("rescued")) == ["FINISHED", "FINISHED"]


def test_an_experiment_for_a_new_run_that_is_deleted_or_no_name_is_rejected(store: str) -> None:
    """And the folder keeps the run that it has."""
    manifest = finished()
    CLIENT().delete_experiment(CLIENT().create_experiment("gone"))
    for name, message in (("gone", r"'gone' \(id \d+\) was deleted .*--experiment NAME"), ("", "MLflow rejects ''")):
        with pytest.raises(ConfigError, match=message):
            sync(manifest.folder, 10, lambda _: None, name)
    assert load_manifest(manifest.folder).mlflow_run_id == manifest.run_id


def test_without_an_answer_the_folder_keeps_the_run_that_it_has(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = finished()
    stored = (manifest.folder / "run.json").read_bytes()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    done = CliRunner().invoke(app.main, ["sync", str(manifest.folder), "--experiment", "elsewhere", "--timeout", "4"])
    assert done.exit_code == 4
    assert (manifest.folder / "run.json").read_bytes() == stored
    assert manifest.folder.parent == Path("outputs")
