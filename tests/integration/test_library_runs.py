"""Runs as a library: the run of the command line, read from its folder and from MLflow, and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner

import cedkv
from cedkv.cli.app import main
from cedkv.core.errors import ConfigError, DataError
from cedkv.runs.outputs import OUTPUTS
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.tasks import other_lookup

SETTINGS: dict[str, Any] = {
    "device": "cpu", "batch_size": 4, "max_on": 4, "max_off": 4, "n_random_trials": 2, "prefix_len": 24, "span_len": 4,
    "span_budget": 3, "min_span_distance": 4, "pairs": 4, "eval.gate_a_samples": 2,
}  # fmt: skip


def evaluate(folder: Path, **settings: Any) -> cedkv.Run:
    return cedkv.evaluate(model_id=folder, **{**SETTINGS, **settings})


def test_an_evaluation_is_the_run_of_the_command_line(llama_folder: Path, store: str) -> None:
    run = evaluate(llama_folder, select_mode="delimiter_span")
    (logged,) = mlflow.search_runs(experiment_names=["cedkv"], filter_string=f"attributes.run_id = '{run.run_id}'").to_dict(
        "records"
    )
    assert logged["status"] == "FINISHED"
    assert {name: f"{value}" for name, value in run.verdicts.items()} == {name: logged[f"tags.{name}"] for name in run.verdicts}
    assert run.config.select.mode == "delimiter_span"
    assert run.config == cedkv.resolve(OUTPUTS / run.run_id / "config.yaml")
    assert run.comparison is None
    assert run.conditions == {}
    assert len(run.on) == len(run.selections) == 4
    assert len(run.off) == 4
    assert run.metrics["phase2_on_acc_student_select"] == pytest.approx(run.on["correct_select"].mean())
    assert run.metrics["phase2_on_acc_student_select"] == logged["metrics.phase2_on_acc_student_select"]
    assert {"gate", "name", "observed", "limit", "verdict"} <= set(run.checks.columns)
    assert set(run.checks["gate"]) == {"A", "B"}
    assert len(run.comparisons) > 0
    assert list(run.selections["sample_id"]) == list(run.on["sample_id"])
    assert repr(run).startswith(f"<run {run.run_id}: delimiter_span, gateA ")
    gate_a = evaluate(llama_folder, phase="1.5")
    assert set(gate_a.verdicts) == {"gateA"}
    assert len(gate_a.off) == 0


def test_a_run_is_read_from_its_folder_by_its_id_and_from_mlflow(
    llama_folder: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = evaluate(llama_folder)
    from_folder, by_id = cedkv.read_run(OUTPUTS / run.run_id), cedkv.read_run(run.run_id)
    shutil.move(OUTPUTS / run.run_id, tmp_path / "elsewhere")
    downloaded = cedkv.read_run(run.run_id)
    for read in (from_folder, by_id, downloaded):
        assert read.run_id == run.run_id
        assert read.config == run.config
        assert read.metrics == run.metrics
        for table in ("on", "off", "selections", "checks", "comparisons"):
            pd.testing.assert_frame_equal(getattr(read, table), getattr(run, table))
    with pytest.raises(ConfigError, match=r"run 0123456789 is neither in outputs/ nor .* MLflow at sqlite.*not found"):
        cedkv.read_run("0123456789")
    with pytest.raises(ConfigError, match="neither the folder of a run nor a run id"):
        cedkv.read_run("no/such/folder")
    points.MLFLOW_CALL.replace(lambda *_: (_ for _ in ()).throw(TimeoutError("no answer in 60 s")), monkeypatch)
    with pytest.raises(ConfigError, match=r"can it be had from MLflow: MLflow at sqlite.*no answer in 60 s"):
        cedkv.read_run(run.run_id)


def test_a_comparison_and_its_conditions(llama_folder: Path, store: str, tmp_path: Path) -> None:
    lists = {"select_modes": ["delimiter_span", "sink_recent"], "keep_sinks": [0]}
    compared = cedkv.compare("ablate_selector", model_id=llama_folder, **SETTINGS, **lists)
    assert compared.comparison == "ablate_selector"
    assert list(compared.conditions) == list(compared.table["condition"])
    modes = {run.config.select.mode for run in compared.conditions.values()}
    assert modes == {"delimiter_span", "sink_recent"}
    assert all(len(run.on) == 4 for run in compared.conditions.values())
    assert len(compared.comparisons) > 0
    assert len(compared.on) == 0
    assert compared.metrics == {}
    shutil.move(OUTPUTS, tmp_path / "elsewhere")
    downloaded = cedkv.read_run(compared.run_id)
    for label, run in compared.conditions.items():
        pd.testing.assert_frame_equal(downloaded.conditions[label].on, run.on)
    done = CliRunner().invoke(main, ["export", compared.run_id, "--out", "tables"])
    assert done.exit_code == 0, done.output
    on = pd.read_csv("tables/on.csv")
    assert on.columns[0] == "condition"
    assert on.groupby("condition").size().to_dict() == dict.fromkeys(compared.conditions, 4)
    assert len(pd.read_csv("tables/conditions.csv")) == 2
    assert len(pd.read_csv("tables/comparisons.csv")) == len(compared.comparisons)


def test_a_wrong_comparison_is_rejected_before_a_run_is_made(llama_folder: Path, store: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ablate_selector'"):
        cedkv.compare("ablate_selectors")
    with pytest.raises(ConfigError, match=r"compare \(ablate_selector\): no setting is named 'selectmodes'"):
        cedkv.compare("ablate_selector", selectmodes=["snapkv"])
    with pytest.raises(ConfigError, match="at least two different conditions"):
        cedkv.compare("ablate_selector", select_modes=["snapkv"], model_id=llama_folder)
    with pytest.raises(ConfigError, match=r"span_budgets = 4 is no list; give its values in one: span_budgets=\[4\]"):
        cedkv.compare("ablate_selector", span_budgets=4, model_id=llama_folder)
    with pytest.raises(ConfigError, match="null_queries"):
        cedkv.compare("ablate_selector", null_queries=[True, True], model_id=llama_folder)
    assert not OUTPUTS.exists()


def test_tables_are_exported(llama_folder: Path, store: str) -> None:
    run = evaluate(llama_folder)
    for to, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        done = CliRunner().invoke(main, ["export", str(OUTPUTS / run.run_id), "--to", to])
        assert done.exit_code == 0, done.output
        folder = Path(f"{run.run_id}-{to}")
        assert sorted(path.stem for path in folder.iterdir()) == ["checks", "comparisons", "metrics", "off", "on", "selections"]
        assert done.output.split() == [
            str(folder / f"{n}.{to}") for n in ("on", "off", "selections", "metrics", "checks", "comparisons")
        ]
        on = read(folder / f"on.{to}")
        assert list(on["sample_id"]) == list(run.on["sample_id"])
        assert on["kl_select_teacher"].tolist() == pytest.approx(run.on["kl_select_teacher"].tolist())
        assert json.loads(on["correct_random"][0]) == run.on["correct_random"][0]
        metrics = dict(read(folder / f"metrics.{to}").to_numpy())
        assert metrics["phase2_on_acc_student_select"] == run.metrics["phase2_on_acc_student_select"]
    missing = CliRunner().invoke(main, ["export", "no-such-run"])
    assert missing.exit_code == 2
    assert "neither in outputs/ nor can it be had from MLflow" in missing.output


def test_what_is_no_finished_run_says_so(llama_folder: Path, store: str) -> None:
    run = evaluate(llama_folder)
    folder = OUTPUTS / run.run_id
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    with pytest.raises(DataError, match="a file of the run cannot be read"):
        cedkv.read_run(folder)
    (folder / "report_phase2.json").unlink()
    with pytest.raises(ConfigError, match=rf"one that is not finished; --resume {run.run_id} finishes it"):
        cedkv.read_run(folder)


def test_a_run_is_read_where_its_task_is_not_registered(llama_folder: Path, store: str) -> None:
    """A program registers one by decorator, and another reads, or exports, what it left: only the configuration names it."""
    with other_lookup() as task:
        run = evaluate(llama_folder, task=task)
        assert run.config.data.task == task
    done = CliRunner().invoke(main, ["export", run.run_id, "--to", "csv", "--out", "tables"])
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv("tables/on.csv")) == len(run.on)
    with pytest.raises(ConfigError, match=f"no task is named '{task}'"):
        _ = cedkv.read_run(run.run_id).config


def test_a_configuration_object_is_taken_as_it_is(llama_folder: Path, store: str) -> None:
    config = tiny.config(llama_folder, "eval.on_samples=2", "eval.off_samples=2")
    assert cedkv.evaluate(config, max_on=3).config == tiny.config(llama_folder, "eval.on_samples=3", "eval.off_samples=2")
