"""Where a run goes in MLflow: what of the environment is obeyed, and which runs and experiments are rejected at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.entities import ViewType
from mlflow.projects.utils import get_or_create_run
from mlflow.utils.name_utils import _generate_random_name

from cedkv.cli import app
from cedkv.core.errors import ConfigError, TrackingError
from cedkv.runs.lifecycle import open_run, sync
from cedkv.runs.manifest import RunManifest, load_manifest
from cedkv.runs.pipeline import opening_tags
from cedkv.runs.resolved import resolve_run
from cedkv.runs.tracking import MlflowTracker, _is_generated
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import n_runs
from tests.support.crashing import run_of_nothing as run

ROOT = Path(__file__).parents[3]
CLIENT = mlflow.MlflowClient


def cedkv_id() -> str:
    return str(mlflow.get_experiment_by_name("cedkv").experiment_id)


def made_by_mlflow_run(monkeypatch: pytest.MonkeyPatch, **parameters: str) -> str:
    """What ``mlflow run`` does before the entry point starts, by its own code: a run with parameters, and its id."""
    made = get_or_create_run(None, str(ROOT), cedkv_id(), str(ROOT), None, "phase2_eval", parameters)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", made.info.experiment_id)
    return str(made.info.run_id)


def empty_run(experiment: str | None = None, **tags: str) -> str:
    return str(CLIENT().create_run(experiment or cedkv_id(), tags=tags).info.run_id)


def with_artifact() -> str:
    run_id = empty_run()
    CLIENT().log_text(run_id, "theirs", "notes.txt")
    return run_id


def with_metric() -> str:
    run_id = empty_run()
    CLIENT().log_metric(run_id, "loss", 0.5)
    return run_id


def with_our_parameter() -> str:
    run_id = empty_run()
    CLIENT().log_param(run_id, "phase2.seed", "7")
    return run_id


def ended(status: str) -> str:
    run_id = empty_run()
    CLIENT().set_terminated(run_id, status)
    return run_id


def deleted() -> str:
    run_id = empty_run()
    CLIENT().delete_run(run_id)
    return run_id


def deleted_with_its_experiment() -> str:
    experiment = CLIENT().create_experiment("deleted, with a run")
    run_id = empty_run(experiment)
    CLIENT().delete_experiment(experiment)
    return run_id


STALE: dict[str, tuple[Callable[[], str], str]] = {
    "finished": (lambda: ended("FINISHED"), "it is FINISHED"),
    "failed": (lambda: ended("FAILED"), "it is FAILED"),
    "metrics": (with_metric, "it has 1 metric"),
    "artifacts": (with_artifact, "it has artifacts"),
    "parameters of ours": (with_our_parameter, "it is a run of cedkv already"),
    "another folder's": (lambda: empty_run(**{"cedkv.origin": "local-1"}), "it is a run of cedkv already"),
    "deleted": (deleted, "was deleted in MLflow; bring it back: mlflow runs restore"),
    "deleted experiment": (deleted_with_its_experiment, "deleted in MLflow with its experiment; .*mlflow experiments restore"),
    "unknown": (lambda: "f" * 32, "is not in MLflow at sqlite:.*set MLFLOW_TRACKING_URI to where it is"),
    "no id MLflow knows": (lambda: "x", "is not in MLflow at sqlite:"),
}


@pytest.mark.parametrize("kind", STALE)
def test_a_stale_run_id_is_rejected_by_name_and_left_as_it_was(store: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make, reason = STALE[kind]
    run_id = make()
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    there = "unknown" not in kind and "no id" not in kind
    before, count = CLIENT().get_run(run_id).to_dictionary() if there else None, n_runs()
    with pytest.raises(ConfigError, match=rf"^MLFLOW_RUN_ID = {run_id}: run {run_id} .*{reason}.*unset MLFLOW_RUN_ID"), run():
        pytest.fail("the run was started")
    assert n_runs() == count
    assert not Path("outputs").exists()
    if there:
        assert CLIENT().get_run(run_id).to_dictionary() == before


def test_a_stale_run_id_ends_the_program_before_the_model_is_loaded(
    store: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points.LOAD_MODEL.replace(lambda *_: pytest.fail("the model was loaded"), monkeypatch)
    monkeypatch.setenv("MLFLOW_RUN_ID", ended("FINISHED"))
    done = CliRunner().invoke(app.main, ["--phase", "2", "--phase2-model-id", str(llama_folder), "--phase2-device", "cpu"])
    assert done.exit_code == 2
    assert "Error: MLFLOW_RUN_ID = " in done.output
    assert not Path("outputs").exists()


def test_what_is_no_id_of_a_run_is_rejected(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "../x")
    with pytest.raises(ConfigError, match=r"^MLFLOW_RUN_ID = '\.\./x' is not the id of a run; unset it"), run():
        pytest.fail("the run was started")


def taking_over(run_id: str) -> RunManifest:
    """The manifest of a process that was started with MLFLOW_RUN_ID, in a folder without that run."""
    return RunManifest("phase2", "2", "ours", run_id=run_id, mlflow_run_id=run_id)


def test_the_run_that_mlflow_run_has_made_is_taken_over_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters stay; a second process with the same id is rejected, also where it has no folder of the run."""
    run_id = made_by_mlflow_run(monkeypatch, max_on="4", select_mode="random_span")
    count = n_runs()
    with run() as job:
        with pytest.raises(ConfigError, match=r"cannot be taken over, because it is a run of cedkv already: "):
            MlflowTracker(10).start(taking_over(run_id))
        job.finish(job.manifest)
    assert n_runs() == count
    found = mlflow.get_run(run_id)
    assert (found.info.run_id, found.info.status) == (job.manifest.run_id, "FINISHED")
    assert found.data.params.items() >= {"max_on": "4", "select_mode": "random_span", "phase2.seed": "42"}.items()


def test_a_store_of_artifacts_that_cannot_be_read_keeps_no_run_away(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by_mlflow_run(monkeypatch)

    def unreadable(*_: Any) -> None:
        raise OSError("no route to the store")

    with run() as job:
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "list_artifacts", unreadable)
            tracker = MlflowTracker(10)
            tracker.start(taking_over(made_by_mlflow_run(monkeypatch)))
            assert tracker.fault is None
        job.finish(job.manifest)


@pytest.mark.parametrize(("status", "results", "taken"), [("FAILED", False, True), ("FINISHED", True, False)])
def test_a_run_that_could_not_be_checked_at_the_start_is_checked_when_it_is_logged(
    store: str, monkeypatch: pytest.MonkeyPatch, status: str, results: bool, taken: bool
) -> None:
    """MLflow was away. ``mlflow run`` has ended its run by then; a run that was stale has results, and stays as it is."""
    run_id = made_by_mlflow_run(monkeypatch)
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError), run() as job:  # noqa: PT012
        job.manifest.set_results({"gain": 0.5}, {}, "text")
        job.finish(job.manifest)
    mlflow.set_tracking_uri(store)
    if results:
        CLIENT().log_metric(run_id, "loss", 0.5)
    CLIENT().set_terminated(run_id, status)
    if taken:
        sync(job.folder, 10, lambda _: None)
        assert load_manifest(job.folder).mlflow_run_id == run_id
        assert mlflow.get_run(run_id).info.status == "FINISHED"
    else:
        with pytest.raises(ConfigError, match=rf"has 1 metric.*cedkv sync {job.folder} --experiment NAME"):
            sync(job.folder, 10, lambda _: None)
        assert mlflow.get_run(run_id).data.metrics == {"loss": 0.5}
        sync(job.folder, 10, lambda _: None, "cedkv")
        logged = mlflow.get_run(str(load_manifest(job.folder).mlflow_run_id))
        assert (logged.info.run_id == run_id, logged.data.metrics) == (False, {"gain": 0.5})


def test_names_that_mlflow_generates_are_told_from_those_of_users() -> None:
    assert all(_is_generated(_generate_random_name()) for _ in range(300))
    numbered = ["seed-sweep-42", "bold-finch-1001", "bold-finch-007", "Bold-finch-1", "bold-finch-1-2", "finch-bold-1"]
    assert [name for name in (*numbered, "bold-finch", "bold--1", "", None) if _is_generated(name)] == []


@pytest.mark.parametrize("name", ["seed-sweep-42", "my own name"])
def test_the_users_name_is_never_overwritten(store: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``mlflow run --run-name`` sets it after the run was made. The run that carries a resume keeps its name as well."""
    run_id = made_by_mlflow_run(monkeypatch)
    CLIENT().set_tag(run_id, "mlflow.runName", name)
    with run(name="ours") as job:
        job.finish(job.manifest)
    sync(job.folder, 10, lambda _: None)
    assert mlflow.get_run(run_id).info.run_name == name
    carrier = made_by_mlflow_run(monkeypatch)
    CLIENT().set_tag(carrier, "mlflow.runName", name)
    MlflowTracker(10).retire(job.manifest)
    found = mlflow.get_run(carrier)
    assert (found.info.run_name, found.info.status, found.data.tags["cedkv.resumed"]) == (name, "FINISHED", run_id)


@pytest.mark.parametrize("taken_over", [False, True])
def test_the_name_of_the_environment_is_the_runs(store: str, monkeypatch: pytest.MonkeyPatch, taken_over: bool) -> None:
    if taken_over:
        made_by_mlflow_run(monkeypatch)
    monkeypatch.setenv("MLFLOW_RUN_NAME", "bold-finch-12")
    resolved = resolve_run("phase2", tiny.config("x"))
    with open_run(resolved, opening_tags(resolved)) as job:
        job.finish(job.manifest)
    assert mlflow.get_run(job.manifest.run_id).info.run_name == "bold-finch-12"


def experiment_of_a_run() -> Any:
    """The experiment to which a run goes in this environment."""
    with run() as job:
        job.finish(job.manifest)
    return mlflow.get_experiment(mlflow.get_run(job.manifest.run_id).info.experiment_id)


@pytest.mark.parametrize("name", ["0", "2024", "a name"])
def test_a_name_of_digits_is_a_name(store: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    first = experiment_of_a_run()
    assert first.name == name
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", first.experiment_id)
    assert experiment_of_a_run().experiment_id == first.experiment_id
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert experiment_of_a_run().experiment_id == first.experiment_id


def rejected(monkeypatch: pytest.MonkeyPatch, message: str, **variables: str) -> None:
    """A run in this environment is rejected, and neither a run nor an experiment is made."""
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_EXPERIMENT_{name}", value)
    before = [each.name for each in CLIENT().search_experiments(view_type=ViewType.ALL)]
    with pytest.raises(ConfigError, match=message), run():
        pytest.fail("the run was started")
    assert not Path("outputs").exists()
    assert [each.name for each in CLIENT().search_experiments(view_type=ViewType.ALL)] == before


@pytest.mark.parametrize("name", ["Default", "not there", "0"])
def test_an_id_and_a_name_of_two_experiments_are_rejected(store: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    both = rf"MLFLOW_EXPERIMENT_ID = '{cedkv_id()}' is experiment 'cedkv', and MLFLOW_EXPERIMENT_NAME = '{name}' is another"
    rejected(monkeypatch, both, ID=cedkv_id(), NAME=name)


@pytest.mark.parametrize("experiment_id", ["987654", "cedkv", "-1"])
def test_an_id_that_no_experiment_has_is_rejected(store: str, monkeypatch: pytest.MonkeyPatch, experiment_id: str) -> None:
    message = rf"MLFLOW_EXPERIMENT_ID = '{experiment_id}': MLflow at sqlite:.* has no experiment with this id; unset it, or set"
    rejected(monkeypatch, message, ID=experiment_id)


def test_a_deleted_experiment_is_rejected_with_the_command_that_restores_it(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = CLIENT().create_experiment("to be deleted")
    CLIENT().delete_experiment(experiment)
    message = rf"'to be deleted' \(id {experiment}\) was deleted .* mlflow experiments restore --experiment-id {experiment}, or"
    rejected(monkeypatch, message, NAME="to be deleted")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    rejected(monkeypatch, message, ID=experiment)


def test_a_name_that_mlflow_rejects_is_rejected(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rejected(monkeypatch, r"MLflow rejects 'xxx.* as the name of an experiment: .*500", NAME="x" * 501)


def test_a_run_that_is_taken_over_stays_in_its_experiment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mlflow run --experiment-name`` beats the variable of the shell, and hands both on."""
    run_id = made_by_mlflow_run(monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the shell")
    with run() as job:
        child = job.child("a", "nested", tiny.config("x"), {})
        job.finish(child)
        job.finish(job.manifest)
    assert {mlflow.get_run(each).info.experiment_id for each in (run_id, child.run_id)} == {cedkv_id()}
    assert mlflow.get_experiment_by_name("of the shell") is None
