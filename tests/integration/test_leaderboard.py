"""``python -m cedkv leaderboard``: from the runs of an MLflow experiment, of two models, to the page and its CSV."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from cedkv.cli.app import main
from cedkv.core.errors import ConfigError
from cedkv.runs.leaderboard import TABLE, experiment_board
from tests.support import tiny
from tests.support.runs import run_comparison, run_phase2
from tests.support.serving import mlflow_server

MODES = {"select_modes": "attention_diversity_span,delimiter_span,oracle_span"}
PARAMS = {
    "phase2.model.id": "org/one", "phase2.select.mode": "delimiter_span", "phase2.data.task": "symbol_lookup",
    "phase2.seed": "1",
}  # fmt: skip


@pytest.fixture
def experiment(store: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An experiment of the test's own."""
    name = f"board-{request.node.name}"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    return name


def logged(experiment: str, right: list[bool], ids: list[str] | None = None, status: str = "FINISHED", **given: Any) -> str:
    """A run as cedkv logs it, without running anything; ``given``: params, tags and rows that differ."""
    mlflow.set_experiment(experiment)
    with mlflow.start_run() as run:
        mlflow.log_params({**PARAMS, **given.get("params", {})})
        mlflow.log_metrics({"phase2_off_delta_p99_select": 0.25})
        mlflow.set_tags({"phase2": "pass", **given.get("tags", {})})
        rows = [
            {"sample_id": sample_id, "correct_base": False, "correct_teacher": True, "correct_select": each,
             "kl_base_teacher": 1.0, "kl_select_teacher": 0.5, **given.get("row", {})}
            for sample_id, each in zip(ids or [f"on-1-{i}" for i in range(len(right))], right, strict=True)
        ]  # fmt: skip
        if given.get("table", True):
            mlflow.log_text(pd.DataFrame(rows).to_json(orient="split", index=False), TABLE)
    mlflow.MlflowClient().set_terminated(run.info.run_id, status)
    return run.info.run_id


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["leaderboard", *arguments])


def test_two_models_and_a_comparison_become_a_page(
    experiment: str, llama_folder: Path, bos_folder: Path, tmp_path: Path
) -> None:
    """Single runs and nested runs count, their parent and phase 1.5 do not; a cell is what its run says."""
    llama, qwen = (
        tiny.config(llama_folder, "eval.lds_masks=0"),
        tiny.config(bos_folder, "eval.lds_masks=0", "eval.on_samples=6"),
    )
    nested = run_comparison("ablate_selector", llama, MODES)
    single = run_phase2(qwen)
    run_phase2(llama, "1.5")
    done = invoke("--experiment", experiment, "--out", "board/page.html")
    assert done.exit_code == 0, done.output
    assert "Left out: 1 run of phase 1.5." in done.output
    table = pd.read_csv("board/page.csv")
    names = [llama_folder.name, bos_folder.name]
    assert list(dict.fromkeys(table["model"])) == names
    assert set(table["task"]) == {"symbol_lookup"}
    for result in nested:
        row = table[table["run_ids"] == result.run_id].iloc[0]
        metrics = result.results.metrics
        assert row["method"] == result.label
        assert row["kind"] == ("reference" if result.reference else "candidate")
        assert row["accuracy"] == pytest.approx(metrics["phase2_on_acc_student_select"])
        assert row["rel_kl"] == pytest.approx(metrics["phase2_rel_kl_to_teacher_select"], rel=1e-6)
        assert row["off_p99"] == pytest.approx(metrics["phase2_off_delta_p99_select"])
    (other,) = table[table["model"] == names[1]].to_dict("records")
    assert other["method"] == "attention_diversity"
    assert other["accuracy"] == pytest.approx(single.metrics["phase2_on_acc_student_select"])
    page = Path("board/page.html").read_text()
    assert all(f">{name}</th>" in page for name in names)
    assert not re.search(r"https?://", page)


def test_seeds_are_pooled_and_a_later_run_takes_the_place_of_an_earlier_one(experiment: str) -> None:
    old = logged(experiment, [False, False])
    new = logged(experiment, [True, False])
    seed = logged(experiment, [True, True], ids=["on-2-0", "on-2-1"], params={"phase2.seed": "2"})
    made = experiment_board(experiment, "", 60)
    ((cell,),) = (row.cells.values() for row in made.board.rows)
    assert set(cell.entry.run_ids) == {new, seed}
    assert old not in cell.entry.run_ids
    assert (cell.n, cell.accuracy) == (4, 0.75)
    assert "1 run superseded by later ones on the same samples." in made.notes


def test_names_say_what_differs_and_nothing_else(experiment: str) -> None:
    logged(experiment, [True])
    logged(experiment, [True], params={"phase2.select.span_budget": "8"})
    logged(experiment, [True], params={"phase2.select.mode": "random_span"})
    logged(experiment, [True], params={"phase2.data.pairs": "16", "phase2.select.span_budget": "4"})
    logged(experiment, [True], params={"phase2.data.on_path": "/data/news.json"})
    logged(experiment, [True], params={"phase2.data.on_path": "/data/news.json", "phase2.data.answer": "first"})
    logged(experiment, [True], params={"phase2.model.id": "org/two", "phase2.runtime.torch_dtype": "float32"})
    logged(experiment, [True], params={"phase2.model.id": "org/two", "phase2.runtime.torch_dtype": "bfloat16"})
    logged(experiment, [True], params={"phase2.eval.n_random_trials": "9", "phase2.runtime.device": "cpu"})
    board = experiment_board(experiment, "", 60).board
    assert board.models == ["one", "two · float32", "two · bfloat16"]
    assert board.tasks == [
        "symbol_lookup · pairs 8",
        "symbol_lookup · pairs 16",
        "news.json · answer single",
        "news.json · answer first",
    ]
    assert {row.method for row in board.rows} == {"delimiter", "delimiter · span_budget 8", "random"}
    assert {row.method for row in board.rows if row.reference} == {"random"}


def test_what_does_not_count_is_counted(experiment: str) -> None:
    logged(experiment, [True])
    logged(experiment, [True], status="FAILED")
    logged(experiment, [True], status="KILLED")
    logged(experiment, [True], table=False)
    logged(experiment, [True], row={"correct_select": "yes"})
    logged(experiment, [True], tags={"phase2": "pending"})
    logged(experiment, [True], tags={"comparison": "ablate_selector"})
    logged(experiment, [True], tags={"cedkv.resumed": "x"})
    with mlflow.start_run():
        mlflow.log_param("lr", 1)
    (note,) = experiment_board(experiment, "", 60).notes
    assert note == (
        "Left out: 1 run not of cedkv, 1 run of phase 1.5, 1 run not finished (killed), 1 run not finished (failed), 2 runs "
        f"without a readable table {TABLE}."
    )


def test_a_filter_chooses_runs(experiment: str) -> None:
    logged(experiment, [True], tags={"team": "a"})
    chosen = logged(experiment, [False], tags={"team": "b"}, params={"phase2.select.mode": "random_span"})
    done = invoke("--experiment", experiment, "--filter", "tags.team = 'b'")
    assert done.exit_code == 0, done.output
    assert list(pd.read_csv("leaderboard.csv")["run_ids"]) == [chosen]


def test_hostile_names_are_text_and_nothing_is_imported(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs may be anyone's: a selector that is a reference is not imported, and no name becomes markup or control."""
    imported: list[str] = []
    monkeypatch.setattr("cedkv.core.registry.importlib.import_module", lambda name: imported.append(name))
    hostile = {
        "phase2.select.mode": "antigravity:x", "phase2.model.id": "a/<script>alert(1)\u202e",
        "phase2.data.on_path": "/x/<img src=x onerror=alert(1)>.json", "phase2.thresholds.on_gain_min": "x",
    }  # fmt: skip
    logged(experiment, [True, False], params=hostile)
    logged(experiment, [True, True], params={**hostile, "phase2.select.mode": "</script><b>"})
    done = invoke("--experiment", experiment)
    assert done.exit_code == 0, done.output
    assert imported == []
    page = Path("leaderboard.html").read_text()
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "<b>" not in page.replace('<b style="left', "")
    assert "\u202e" not in page + done.output
    assert "&lt;script&gt;alert(1)\\u202e" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experiment", "no-such"], r"no experiment 'no-such' at sqlite"),
        (["--experiment", "cedk"], r"did you mean 'cedkv'\?"),
        (
            ["--experiment", "cedkv", "--filter", "tags.nothing = 'x'"],
            r"has no finished evaluation of phase 2 that fits the filter",
        ),
        (["--experiment", "cedkv", "--filter", "tags x"], r"MLflow at sqlite.*"),
    ],
)
def test_nothing_to_read_is_an_error_with_a_remedy(store: str, arguments: list[str], said: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert re.search(said, done.output), done.output
    assert done.output.count("Error: ") == 1
    assert not Path("leaderboard.html").exists()


def test_an_empty_experiment_says_so(experiment: str) -> None:
    mlflow.create_experiment(experiment)
    with pytest.raises(ConfigError, match=r"has no finished evaluation of phase 2 \(0 runs\)\. Run one"):
        experiment_board(experiment, "", 60)


def test_a_page_that_cannot_be_written_is_an_error(experiment: str) -> None:
    logged(experiment, [True])
    Path("file").write_text("")
    done = invoke("--experiment", experiment, "--out", "file/page.html")
    assert done.exit_code == 2
    assert "cannot be written" in done.output


@pytest.mark.server
def test_runs_on_a_server(tmp_path: Path, store: str) -> None:
    server = mlflow_server(tmp_path, f"sqlite:///{tmp_path}/server.db")
    server.start()
    try:
        mlflow.set_tracking_uri(server.uri)
        run_id = logged("there", [True, False])
        mlflow.set_tracking_uri(store)
        done = invoke("--experiment", "there", "--tracking-uri", server.uri)
    finally:
        server.kill()
    assert done.exit_code == 0, done.output
    assert list(pd.read_csv("leaderboard.csv")["run_ids"]) == [run_id]
    done = invoke("--experiment", "there", "--tracking-uri", server.uri, "--timeout", "4")
    assert done.exit_code == 2
    assert f"MLflow at {server.uri}" in done.output
