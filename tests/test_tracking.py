"""MLflow: what a run shows, whose name it keeps, and what is said when the store cannot be used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from cedkv import tracking
from cedkv.errors import CedkvError, TrackingError
from tests import tiny

CLIENT = mlflow.MlflowClient


def made_by_mlflow_run(monkeypatch: pytest.MonkeyPatch, name: str | None) -> str:
    """What ``mlflow run`` does before the entry point starts: a run, and its id in the environment."""
    experiment = mlflow.get_experiment_by_name("cedkv").experiment_id
    run_id = CLIENT().create_run(experiment, run_name=name).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    return run_id


def n_runs() -> int:
    return len(mlflow.search_runs(experiment_names=["cedkv"], output_format="list"))


def test_parameters_are_the_resolved_config_under_dotted_names(store: str) -> None:
    """``-P`` values are logged under their own names already; these must not meet them. None is null, not "None"."""
    config = tiny.config("x", "layer_scope.injection=[1,2]", "select.mode=delimiter_span", "data.on_path=null")
    with tracking.tracked_run("n", {}) as run_id:
        tracking.log_config(config)
    params = mlflow.get_run(run_id).data.params
    assert params.keys() == config.dotted().keys()
    assert all(name.startswith("phase2.") for name in params)
    assert params["phase2.select.mode"] == "delimiter_span"
    assert params["phase2.data.on_path"] == "null"
    assert params["phase2.layer_scope.injection"] == "[1, 2]"
    assert params["phase2.prefix_len"] == "24"
    assert params["phase2.runtime.fail_on_gate"] == "false"
    assert float(params["phase2.thresholds.rel_kl_to_teacher_max"]) == 1.0


def test_long_values_are_cut_not_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLflow does not cut by itself, it refuses a value beyond 6,000 characters and all others of the batch."""
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    with tracking.tracked_run("n", {}) as run_id:
        tracking.log_config(tiny.config("x", f"data.on_path={'ä' * 9000}"))
    params = mlflow.get_run(run_id).data.params
    assert params["phase2.data.on_path"] == "ä" * 6000
    assert params["phase2.model.id"] == "x"


def test_a_name_the_user_chose_is_kept(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = made_by_mlflow_run(monkeypatch, "my own name")
    with tracking.tracked_run("ours", {}) as taken:
        assert taken == run_id
    assert mlflow.get_run(run_id).info.run_name == "my own name"


def test_a_generated_name_is_replaced(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow names a run itself (``bold-finch-123``) when the user does not; the run is taken over, no second one made."""
    run_id = made_by_mlflow_run(monkeypatch, None)
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", mlflow.get_run(run_id).info.run_name)
    before = n_runs()
    with tracking.tracked_run("attention · compact · seed 42", {"gateA": "pending"}) as taken:
        assert taken == run_id
    run = mlflow.get_run(run_id)
    assert run.info.run_name == run.data.tags["mlflow.runName"] == "attention · compact · seed 42"
    assert run.data.tags["gateA"] == "pending"
    assert run.info.status == "FINISHED"
    assert n_runs() == before


def test_a_run_of_its_own_goes_to_the_named_experiment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless MLflow's environment names another one."""
    with tracking.tracked_run("ours", {}) as run_id:
        pass
    run = mlflow.get_run(run_id)
    assert mlflow.get_experiment(run.info.experiment_id).name == "cedkv"
    assert run.info.run_name == "ours"
    other = mlflow.get_experiment_by_name("elsewhere")
    wanted = other.experiment_id if other else mlflow.create_experiment("elsewhere")
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None, raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", wanted)
    with tracking.tracked_run("ours", {}) as run_id:
        pass
    assert mlflow.get_run(run_id).info.experiment_id == wanted


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(143)])
def test_whatever_ends_a_run_early_makes_it_failed(store: str, error: BaseException) -> None:
    with pytest.raises(type(error)), tracking.tracked_run("n", {"phase2": "pending"}) as run_id:
        raise error
    assert mlflow.get_run(run_id).info.status == "FAILED"
    assert mlflow.active_run() is None


def test_results_are_in_the_run_as_people_look_for_them(store: str, tmp_path: Path) -> None:
    """The compare view groups tables by their first column; a metric that could not be computed is left out, not 0."""
    folder = tmp_path / "out"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "report_phase2.json").write_text("{}")
    (folder / "artifacts" / "x.json").write_text("{}")
    table = pd.DataFrame([{"sample_id": "on-1", "correct_select": True}, {"sample_id": "on-2", "correct_select": False}])
    with tracking.tracked_run("n", {"gateA": "pending"}) as run_id:
        tracking.log_results({"gain": 0.5, "gap": None}, {"gateA": "pass"}, {"on.json": table}, "### gateA **pass**\n", folder)
    run = mlflow.get_run(run_id)
    assert run.data.metrics == {"gain": 0.5}
    assert run.data.tags["gateA"] == "pass"
    assert run.data.tags["mlflow.note.content"] == "### gateA **pass**\n"
    assert {item.path for item in CLIENT().list_artifacts(run_id)} == {"on.json", "report_phase2.json", "artifacts"}
    logged = mlflow.load_table("on.json", run_ids=[run_id])
    assert list(logged.columns) == ["sample_id", "correct_select"]
    assert logged["sample_id"].tolist() == ["on-1", "on-2"]


def test_datasets_are_inputs_with_their_context(store: str) -> None:
    samples = pd.DataFrame([{"sample_id": "on-1", "query_text": "Word: dax"}])
    with tracking.tracked_run("n", {}) as run_id:
        tracking.log_datasets({"on": ("symbol_lookup(pairs=4, seed=1)", samples), "off": ("o" * 900, samples)})
    inputs = mlflow.get_run(run_id).inputs.dataset_inputs
    assert {item.tags[0].value: item.dataset.name[:13] for item in inputs} == {"on": "symbol_lookup", "off": "o" * 13}


@pytest.fixture
def no_waiting(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.mark.parametrize("user", ["user:secret@", "user:s%40cret@", "user:p@cret@", "cret@"])
def test_a_server_that_is_not_there_is_named_without_credentials(no_waiting: None, user: str) -> None:
    """Port 9 refuses. Both our words and MLflow's own, which quote the address in full, end up in logs."""
    mlflow.set_tracking_uri(f"http://{user}127.0.0.1:9")
    with pytest.raises(TrackingError) as caught, tracking.tracked_run("n", {}):
        pytest.fail("a run was started")
    message = str(caught.value)
    assert isinstance(caught.value, CedkvError)
    assert message.startswith("MLflow at http://127.0.0.1:9: no run could be started: ")
    assert "refused" in message
    assert "MLFLOW_TRACKING_URI" in message
    assert "cret" not in message
    assert "user" not in message


def test_a_store_that_is_no_database_is_an_error_for_the_user(no_waiting: None, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 1000)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with (
        pytest.raises(TrackingError, match=r"mlflow\.db: no run could be started: .*not a database"),
        tracking.tracked_run("n", {}),
    ):
        pytest.fail("a run was started")


def test_a_missing_driver_is_an_error_for_the_user(no_waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    mlflow.set_tracking_uri("mysql+pymysql://user:secret@127.0.0.1:9/db")
    with pytest.raises(TrackingError, match=r"no run could be started: .*pymysql") as caught, tracking.tracked_run("n", {}):
        pytest.fail("a run was started")
    assert "secret" not in str(caught.value)


def test_results_that_cannot_be_logged_are_said_to_be_safe(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes away at the end of a long run: the message names the folder that holds everything.

    That the run cannot be ended either must not take this message's place, as it does in mlflow's own context manager.
    """

    def gone(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("connection refused by http://user:secret@host/api")

    def run() -> None:
        with tracking.tracked_run("n", {}):
            monkeypatch.setattr(mlflow.MlflowClient, "log_batch", gone)
            monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", gone)
            tracking.log_results({"gain": 1.0}, {}, {}, "", tmp_path / "out")

    with pytest.raises(TrackingError, match=f"the results are safe in {tmp_path / 'out'}") as caught:
        run()
    assert "secret" not in str(caught.value)
    assert mlflow.active_run() is None


def test_an_end_that_cannot_be_recorded_is_an_error_for_the_user(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("gone")

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", gone)
    with pytest.raises(TrackingError, match="the end of the run was not recorded: gone"), tracking.tracked_run("n", {}):
        pass


@pytest.mark.parametrize("error", [mlflow.MlflowException("gone"), OSError("full"), ImportError("No module named 'boto3'")])
def test_a_crash_is_not_hidden_behind_a_failing_upload(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(mlflow, "log_artifacts", fails)
    with pytest.warns(UserWarning, match=f"the files of the failed run are in {tmp_path}"):
        tracking.log_partial(tmp_path)


def test_where_to_look_has_no_credentials(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.tracked_run("n", {}) as run_id:
        assert tracking.where_to_look().startswith("mlflow ui --host 127.0.0.1")
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://user:p@ss@host:5000/mlflow")
        found = tracking.where_to_look()
    assert found.startswith("https://host:5000/mlflow/#/experiments/")
    assert found.endswith(f"/runs/{run_id}")


def test_nested_runs_are_compared_by_a_link(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their filter has backticks, quotes and spaces, which a terminal would cut a link at."""
    with tracking.tracked_run("n", {}) as run_id:
        pass
    experiment = mlflow.get_run(run_id).info.experiment_id
    found = tracking.compare_view(run_id, "CHART")
    assert found.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?compareRunsMode=CHART&searchFilter=tags.")
    assert re.fullmatch(r"[\w:/.#?&=%-]+", found)
    assert f"mlflow.parentRunId%60%20%3D%20%27{run_id}%27&" in found
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://user:p@ss@host:5000")
    monkeypatch.setattr(mlflow, "get_run", lambda _: mlflow.MlflowClient(store).get_run(run_id))
    assert tracking.compare_view(run_id, "ARTIFACT").startswith("https://host:5000/#/experiments/")
