"""MLflow: what a run shows, whose name it keeps, how it ends."""

from __future__ import annotations

import re
from typing import Any

import mlflow
import pandas as pd
import pytest

from cedkv.core.errors import ConfigError
from cedkv.runs.lifecycle import ActiveRun, sync
from cedkv.runs.manifest import RunManifest, load_manifest
from cedkv.runs.publish import save_table
from cedkv.runs.tracking import MlflowTracker, compare_view, describe_datasets, where_to_look
from tests.support import tiny
from tests.support.crashing import n_runs
from tests.support.crashing import run_of_nothing as run

CLIENT = mlflow.MlflowClient


def ended(job: ActiveRun) -> Any:
    """The finished run, as MLflow has it."""
    job.finish(job.manifest)
    return mlflow.get_run(job.manifest.run_id)


def made_by_mlflow_run(monkeypatch: pytest.MonkeyPatch, name: str | None, **tags: str) -> str:
    """What ``mlflow run`` does before the entry point starts: a run, and its id in the environment."""
    experiment = mlflow.get_experiment_by_name("cedkv").experiment_id
    run_id = CLIENT().create_run(experiment, run_name=name, tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    return run_id


def test_parameters_are_the_resolved_config_under_dotted_names(store: str) -> None:
    """``-P`` values are logged under their own names already; these must not meet them. None is null, not "None"."""
    config = tiny.config("x", "layer_scope.injection=[1,2]", "select.mode=delimiter_span", "data.on_path=null")
    with run(config) as job:
        params = ended(job).data.params
    assert params.keys() == config.dotted().keys()
    assert all(name.startswith("phase2.") for name in params)
    assert params["phase2.select.mode"] == "delimiter_span"
    assert params["phase2.data.on_path"] == "null"
    assert params["phase2.layer_scope.injection"] == "[1, 2]"
    assert params["phase2.prefix_len"] == "24"
    assert params["phase2.runtime.fail_on_gate"] == "false"
    assert float(params["phase2.thresholds.rel_kl_to_teacher_max"]) == 1.0


def test_long_values_are_cut_not_rejected(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLflow does not cut by itself, it rejects a value beyond its limit and all others of the batch."""
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    with run(tiny.config("x", f"model.id={'ä' * 3000}")) as job:
        job.manifest.set_results({}, {"best": "ä" * 9000}, "d" * 9000)
        data = ended(job).data
    assert data.params["phase2.model.id"] == "ä" * 3000
    assert (len(data.tags["best"]), len(data.tags["mlflow.note.content"])) == (8000, 8000)


def test_a_name_the_user_chose_is_kept(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = made_by_mlflow_run(monkeypatch, "my own name")
    with run(name="ours") as job:
        assert ended(job).info.run_id == run_id
    assert mlflow.get_run(run_id).info.run_name == "my own name"


def test_a_generated_name_is_replaced(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow names a run itself (``bold-finch-123``) when the user does not; the run is taken over, no second one made."""
    run_id = made_by_mlflow_run(monkeypatch, None)
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", mlflow.get_run(run_id).info.run_name)
    before = n_runs()
    with run(name="attention · compact · seed 42") as job:
        assert job.manifest.run_id == run_id
        assert mlflow.get_run(run_id).data.tags["gateA"] == "pending"
        found = ended(job)
    assert found.info.run_name == found.data.tags["mlflow.runName"] == "attention · compact · seed 42"
    assert found.info.status == "FINISHED"
    assert n_runs() == before


def test_a_run_that_has_results_is_not_taken_over(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mlflow run --run-id`` with the same id, or MLFLOW_RUN_ID left in a shell: two runs would share a folder."""
    run_id = made_by_mlflow_run(monkeypatch, None)
    with run() as job:
        ended(job)
    known = rf"MLFLOW_RUN_ID = {run_id}: outputs/{run_id} holds this run already.*resume={run_id} .*unset MLFLOW_RUN_ID"
    with pytest.raises(ConfigError, match=known), run():
        pytest.fail("a second run was started")
    assert mlflow.get_run(run_id).info.status == "FINISHED"


def test_the_run_that_carried_a_resume_is_ended_and_says_so(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of somebody's own is left alone."""
    with run(name="ours") as job:
        ended(job)
    for source, status in (("PROJECT", "FINISHED"), ("LOCAL", "RUNNING")):
        made = made_by_mlflow_run(monkeypatch, None, **{"mlflow.source.type": source})
        MlflowTracker(4).retire(job.manifest)
        found = mlflow.get_run(made)
        assert found.info.status == status
        assert (found.info.run_name == "resume of ours") == (status == "FINISHED")
        assert (found.data.tags.get("cedkv.resumed") == job.manifest.run_id) == (status == "FINISHED")


def test_a_run_of_its_own_goes_to_the_named_experiment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless MLflow's environment names another one."""
    with run(name="ours") as job:
        found = ended(job)
    assert mlflow.get_experiment(found.info.experiment_id).name == "cedkv"
    assert found.info.run_name == "ours"
    assert found.data.tags["mlflow.source.type"] == "LOCAL"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    with run() as job:
        found = ended(job)
    assert mlflow.get_experiment(found.info.experiment_id).name == "elsewhere"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_whatever_ends_a_run_early_is_told(
    store: str, error: BaseException, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), run() as job:  # noqa: PT012
        (job.folder / "metrics.jsonl").write_text("{}\n")
        raise error
    assert mlflow.get_run(job.manifest.run_id).info.status == status
    assert [item.path for item in CLIENT().list_artifacts(job.manifest.run_id)] == ["config.yaml", "metrics.jsonl"]
    assert f"ended as {status}; its data is in outputs/{job.manifest.run_id}. Continue with --resume" in capsys.readouterr().err


def test_results_are_in_the_run_as_people_look_for_them(store: str) -> None:
    """The compare view groups tables by their first column; a metric that could not be computed is left out, not 0."""
    table = pd.DataFrame([{"sample_id": "on-1", "correct_select": True}, {"sample_id": "on-2", "correct_select": False}])
    with run() as job:
        (job.folder / "artifacts").mkdir()
        for name in ("report_phase2.json", "artifacts/x.json", "journal.jsonl", "half.json.part"):
            (job.folder / name).write_text("{}")
        save_table(job.manifest, "on.json", table)
        job.manifest.set_results({"gain": 0.5, "gap": None}, {"gateA": "pass"}, "### gateA **pass**\n")
        found = ended(job)
    assert found.data.metrics == {"gain": 0.5}
    assert found.data.tags["gateA"] == "pass"
    assert found.data.tags["mlflow.note.content"] == "### gateA **pass**\n"
    there = {item.path for item in CLIENT().list_artifacts(job.manifest.run_id)}
    assert there == {"on.json", "report_phase2.json", "artifacts", "config.yaml"}
    mlflow.set_experiment("cedkv")
    logged = mlflow.load_table("on.json", run_ids=[job.manifest.run_id])
    assert list(logged.columns) == ["sample_id", "correct_select"]
    assert logged["sample_id"].tolist() == ["on-1", "on-2"]


def test_datasets_are_inputs_with_their_context(store: str) -> None:
    samples = pd.DataFrame([{"sample_id": "on-1", "query_text": "Word: dax"}])
    with run() as job:
        job.manifest.datasets = describe_datasets({"on": ("symbol_lookup(pairs=4)", samples), "off": ("o" * 900, samples)})
        inputs = ended(job).inputs.dataset_inputs
    assert {item.tags[0].value: item.dataset.name[:13] for item in inputs} == {"on": "symbol_lookup", "off": "o" * 13}


def test_logging_again_changes_nothing(store: str) -> None:
    """``sync`` may be called as often as one likes: no second metric, input or table row."""
    samples = pd.DataFrame([{"sample_id": "on-1", "query_text": "Word: dax"}])
    with run() as job:
        job.manifest.datasets = describe_datasets({"on": ("a", samples)})
        save_table(job.manifest, "on.json", samples)
        job.manifest.set_results({"gain": 0.5}, {"gateA": "pass"}, "text")
        first = ended(job)
    for _ in range(2):
        sync(job.folder, 10, lambda _: None)
    again = mlflow.get_run(job.manifest.run_id)
    assert again.data.to_dictionary() == first.data.to_dictionary()
    assert again.info.end_time == job.manifest.end_time
    assert len(again.inputs.dataset_inputs) == 1
    assert len(CLIENT().get_metric_history(job.manifest.run_id, "gain")) == 1
    mlflow.set_experiment("cedkv")
    assert len(mlflow.load_table("on.json", run_ids=[job.manifest.run_id])) == 1


def test_sync_ends_a_run_that_was_killed_without_a_word(store: str) -> None:
    entry = RunManifest("phase2", "2", "n")
    MlflowTracker(4).start(entry)
    entry.write(tiny.config("x"))
    assert mlflow.get_run(entry.run_id).info.status == "RUNNING"
    sync(entry.folder, 10, lambda _: None)
    assert mlflow.get_run(entry.run_id).info.status == "KILLED"


def test_where_to_look_has_no_credentials(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with run() as job:
        ended(job)
    page = rf"http://127.0.0.1:5000/#/experiments/\d+/runs/{job.manifest.run_id}"
    assert re.fullmatch(rf"mlflow ui --host 127.0.0.1 --backend-store-uri {store}, then {page}", where_to_look(job.manifest))
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://user:p@ss@host:5000/mlflow")
    found = where_to_look(job.manifest)
    assert found.startswith("https://host:5000/mlflow/#/experiments/")
    assert found.endswith(f"/runs/{job.manifest.run_id}")


def test_the_description_links_to_the_run_that_it_is_logged_with(store: str) -> None:
    """``run.json`` keeps the links to files, so that ``sync`` makes them again, for another MLflow too."""
    with run() as job:
        job.manifest.set_results({}, {}, "[page](report.html)")
        found = ended(job)
    note, run_id = found.data.tags["mlflow.note.content"], job.manifest.run_id
    assert note == f"[page](#/experiments/{found.info.experiment_id}/runs/{run_id}/artifacts/report.html)"
    assert load_manifest(job.folder).tags["mlflow.note.content"] == "[page](report.html)"
    sync(job.folder, 10, lambda _: None)
    assert mlflow.get_run(run_id).data.tags["mlflow.note.content"] == note


def test_nested_runs_are_compared_by_a_link(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their filter has backticks, quotes and spaces, which a terminal would cut a link at."""
    with run() as job:
        ended(job)
    run_id = job.manifest.run_id
    experiment = mlflow.get_run(run_id).info.experiment_id
    found = compare_view(job.manifest, "CHART")
    assert found.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?compareRunsMode=CHART&searchFilter=tags.")
    assert re.fullmatch(r"[\w:/.#?&=%-]+", found)
    assert f"mlflow.parentRunId%60%20%3D%20%27{run_id}%27&" in found
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://user:p@ss@host:5000")
    assert compare_view(job.manifest, "ARTIFACT").startswith("https://host:5000/#/experiments/")
