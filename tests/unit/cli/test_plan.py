"""``python -m cedkv plan``: what a run takes, without weights and without a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cedkv.cli import app
from cedkv.config.options import COMPARISONS, OPTIONS
from cedkv.core.errors import RunInterrupted
from cedkv.runs.manifest import find_resumable
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.runs import run_phase2

SIZES = (
    "eval.on_samples=4,eval.off_samples=4,eval.gate_a_samples=2,prefix_len=24,select.span_len=4,select.span_budget=3,"
    "data.pairs=4"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    return tiny.save_without_weights(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(model: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app.main, ["plan", "--model_id", str(model), "--device", "cpu", "--set", SIZES, *arguments])


def test_a_single_run_is_planned_and_nothing_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)  # a run would look for it in MLflow
    found = plan(model, "--select_mode", "random_span")
    assert found.exit_code == 0, found.output
    assert re.search(r"^symbol_lookup +1 +4 +4 +1 +\d+ +[\d,]+", found.output, re.MULTILINE)
    assert "nothing was run" in found.output
    assert "time: not known without a rate" in found.output
    assert re.search(r"weights +\d+ kB", found.output)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "conditions"),
    [
        (["--comparison", "ablate_selector", "--select_modes", "random_span,delimiter_span", "--keep_sinks", "0,2"], "4"),
        (["--comparison", "compare-positioning", "--kv_sources", "prefill", "--keep_sinks", "0"], "4"),
    ],
)
def test_a_comparison_is_planned(arguments: list[str], conditions: str, model: Path) -> None:
    found = plan(model, *arguments, "--rate", "1000", "--workers", "4", "--json", "plan.json")
    assert found.exit_code == 0, found.output
    written = json.loads(Path("plan.json").read_text())
    assert written["command"] == arguments[1].replace("-", "_")
    assert str(written["tasks"][0]["conditions"]) == conditions
    assert written["total"]["tokens"] == sum(sum(unit.values()) for unit in written["tasks"][0]["unit_stages"])
    assert written["time"]["workers"] == 4
    assert written["time"]["units"] == pytest.approx(written["total"]["tokens"] / 1000)  # one unit: one worker works
    assert written["peak_bytes"] == sum(written["memory"].values())
    assert "time on 4 workers" in found.output


def test_a_grid_of_tasks_has_a_sum(model: Path) -> None:
    lists = ["--tasks", "symbol_lookup,kv_retrieval", "--select_modes", "random_span", "--keep_sinks", "0,1"]
    found = plan(model, "--comparison", "ablate_selector", *lists, "--answer", "whole", "--lds_masks", "0")
    assert found.exit_code == 0, found.output
    rows = {line.split()[0]: line.split()[1:] for line in found.output.splitlines() if line.startswith(("sym", "kv_", "all "))}
    numbers = {name: [int(cell.replace(",", "")) for cell in cells] for name, cells in rows.items()}
    *sums, longest = zip(numbers["symbol_lookup"], numbers["kv_retrieval"], strict=True)
    assert numbers["all"] == [*map(sum, sums), max(longest)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "select.span_lenn=6"], "did you mean 'select.span_len'?"),
        (["--on_path", "absent.jsonl"], "absent.jsonl"),
        (["--selection_layers", "[7]"], "the model's last is 3"),
        (["--pairs", "200", "--set", "data.params={repeats: true}"], "longer than the model's context"),
        (
            ["--keep_sinks", "0,4"],
            "--keep_sinks is a list of conditions; add --comparison ablate_selector or compare_positioning",
        ),
        (["--comparison", "compare_positioning", "--select_modes", "all"], "add --comparison ablate_selector, or leave it out"),
        (["--rate", "5", "--from", "abc"], "--from abc and --rate 5 both say how fast the model is"),
        (["--from", "abc"], "does not exist"),
        (["--rate", "0"], "0.0 is not in the range x>0"),
        (["--workers", "0"], "runtime.workers"),
        (["--workers", "auto"], "give a number"),
        (["--model_id", "nowhere/at-all"], "cannot be loaded"),
    ],
)
def test_errors_are_those_of_a_run(arguments: list[str], message: str, model: Path) -> None:
    found = plan(model, *arguments)
    assert found.exit_code == 2, found.output
    assert message in found.output


def test_every_option_of_a_run_is_one_of_its_plan() -> None:
    options = {option for parameter in app.plan_command.params for option in parameter.opts}
    flags = {option for parameter in app.main.params for option in parameter.opts if option.startswith("--phase2-")}
    lists = {f"--{name}" for comparison in COMPARISONS.values() for name in comparison}
    assert options >= {f"--{name}" for name in OPTIONS} | (flags - {"--phase2-strict-hf"}) | lists | {
        "--phase",
        "--config",
        "--set",
    }


def test_the_pace_of_a_finished_run(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points.without_mlflow(monkeypatch)
    config = tiny.config(llama_folder, "select.mode=random_span")
    run_phase2(config)
    (folder,) = Path("outputs").iterdir()
    for run in (folder.name, str(folder)):
        found = plan(llama_folder, "--from", run, "--dtype", "bfloat16", "--json", "plan.json")
        assert found.exit_code == 0, found.output
        rate = json.loads(Path("plan.json").read_text())["rate"]
        assert rate["source"] == folder.name
        assert rate["by_stage"].keys() >= {"teacher", "base", "select", "random", "gate A", "repeat"}
        assert "the pace is of float32, not of bfloat16" in found.output
    itself = json.loads(folder.joinpath("run.json").read_text())["seconds"]
    again = CliRunner().invoke(
        app.main, ["plan", "--config", str(folder / "config.yaml"), "--from", folder.name, "--json", "plan.json"]
    )
    assert again.exit_code == 0, again.output
    units = sum(seconds for stage, seconds in itself.items() if stage not in ("start", "load", "report"))
    assert json.loads(Path("plan.json").read_text())["time"]["units"] == pytest.approx(units, rel=1e-6)


def test_a_resumed_run_gives_no_pace(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points.without_mlflow(monkeypatch)
    config, appended = tiny.config(llama_folder, "select.mode=random_span", "runtime.batch_size=3"), list[str]()

    def interrupt(real: Any, journal: Any, unit: str, *finished: Any) -> None:
        if appended:
            raise RunInterrupted("no space left")
        appended.append(unit)
        real(journal, unit, *finished)

    with monkeypatch.context() as patch:
        points.JOURNAL_APPEND.wrap(patch, interrupt)
        with pytest.raises(RunInterrupted):
            run_phase2(config)
    (folder,) = Path("outputs").iterdir()
    assert "has no times (FAILED)" in plan(llama_folder, "--from", folder.name).output
    run_phase2(config, resumed=find_resumable(folder.name))
    found = plan(llama_folder, "--from", folder.name)
    assert found.exit_code == 2
    assert "the times of 1 unit before that are lost" in found.output
