"""A grid of tasks and selectors: conditions of one task share samples; the parent ranks methods over tasks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.runs.journal import Journal
from cedkv.runs.manifest import find_resumable
from cedkv.runs.outputs import OUTPUTS
from cedkv.runs.render import render_again
from tests.integration.test_comparison import children_of, only_parent
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import forked, left_by
from tests.support.runs import run_comparison
from tests.support.tasks import other_lookup

MODES = ("attention_diversity_span", "delimiter_span", "random_span")
TASKS = ("symbol_lookup", "other_lookup")
LISTS = {"tasks": ",".join(TASKS), "select_modes": ",".join(MODES)}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with other_lookup():
        yield


@pytest.fixture
def config(llama_folder: Path) -> Phase2Config:
    return tiny.config(llama_folder, "eval.lds_masks=0")


def journal_units(run_id: str) -> list[dict[str, Any]]:
    lines = (OUTPUTS / run_id / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def parent_folder() -> Path:
    """The folder of the only comparison there is."""
    (folder,) = (folder for folder in OUTPUTS.iterdir() if (folder / "journal.jsonl").exists())
    return folder


def test_every_task_is_a_comparison_of_its_own_and_the_parent_ranks_over_them(
    config: Phase2Config, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_comparison("ablate_selector", config, LISTS)
    said = capsys.readouterr()
    assert [(r.config.data.task, r.config.select.mode) for r in results] == [(t, m) for t in TASKS for m in MODES]
    ids = {task: [[s["sample_id"] for s in r.records.on] for r in results if r.config.data.task == task] for task in TASKS}
    assert all(each == ids[task][0] for task in TASKS for each in ids[task])
    assert ids["symbol_lookup"][0][0].startswith("on-42-")
    assert ids["other_lookup"][0][0].startswith("on-43-")

    parent = only_parent("ablate_selector")
    run_id, folder = parent.info.run_id, OUTPUTS / parent.info.run_id
    units = journal_units(run_id)
    assert [unit["unit"] for unit in units] == [f"{task}/unit/0000{i}" for task in TASKS for i in range(2)]
    assert [[bool(records) for records in unit["records"]] for unit in units] == [[True] * 3 + [False] * 3] * 2 + [
        [False] * 3 + [True] * 3
    ] * 2
    header = json.loads((folder / "journal.jsonl").read_text().splitlines()[0])["header"]
    assert header["symbol_lookup/samples.on.digest"] != header["other_lookup/samples.on.digest"]
    assert header["symbol_lookup/samples.off.digest"] == header["other_lookup/samples.off.digest"]

    assert parent.info.run_name == "ablate_selector · 2 tasks · 6 conditions · seed 42"
    assert parent.data.tags["factors"] == "data.task, select.mode"
    assert parent.data.tags["tasks"] == "symbol_lookup, other_lookup"
    nested = children_of(run_id)
    assert [run.info.run_name for run in nested] == [f"{t} · {m.removesuffix('_span')}" for t in TASKS for m in MODES]
    sources = {run.info.run_id: {item.dataset.name for item in run.inputs.dataset_inputs} for run in nested}
    assert all(any(name.startswith("symbol_lookup") for name in sources[run.info.run_id]) for run in nested[:3])
    assert not any(name.startswith("symbol_lookup") for run in nested[3:] for name in sources[run.info.run_id])
    assert len(parent.inputs.dataset_inputs) == 3, "ON samples of two tasks, and OFF prompts once"

    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)}
    assert files >= {
        "report.html", "report_symbol_lookup.html", "report_other_lookup.html", "comparison.json", "summary.md",
        "conditions.json", "comparisons.json", "leaderboard.csv", "leaderboard.json", "figures",
    }  # fmt: skip
    content = json.loads((folder / "comparison.json").read_text())
    assert [task["task"] for task in content["tasks"]] == list(TASKS)
    assert [len(task["conditions"]) for task in content["tasks"]] == [3, 3]
    labels = {mode.removesuffix("_span") for mode in MODES}
    assert all({row["left"] for row in task["comparisons"]} <= labels for task in content["tasks"])
    assert parent.data.tags["best"] == (content["best"] or "none")
    mlflow.set_experiment("cedkv")
    for name in ("conditions.json", "comparisons.json"):
        assert set(mlflow.load_table(name, run_ids=[run_id])["task"]) == set(TASKS)
    table = pd.read_csv(folder / "leaderboard.csv")
    assert {tuple(row) for row in table[["task", "method"]].itertuples(index=False)} == {(t, m) for t in TASKS for m in labels}
    for r in results:
        row = table[table["run_ids"] == r.run_id].iloc[0]
        assert row["accuracy"] == pytest.approx(r.results.metrics["phase2_on_acc_student_select"])
        assert row["rel_kl"] == pytest.approx(r.results.metrics["phase2_rel_kl_to_teacher_select"])
    page = (folder / "report.html").read_text()
    assert page.count('<td class="rank">') == 3
    assert 'href="report_other_lookup.html"' in page
    summary = (folder / "summary.md").read_text()
    assert summary.index("## Accuracy") < summary.index("## symbol\\_lookup") < summary.index("## other\\_lookup")
    assert "symbol_lookup: 3 conditions on 6 ON samples and 8 OFF prompts; other_lookup: 3 conditions" in said.err
    assert "mean rank" in said.out

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.json"}
    shutil.rmtree(folder / "figures")
    render_again(folder, lambda _: None)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (folder / "figures" / "symbol_lookup_01_accuracy_by_condition.png").exists()


@pytest.mark.usefixtures("small_fits")
def test_a_condition_of_a_grid_of_tasks_is_the_one_of_a_grid_of_its_task(config: Phase2Config, store: str) -> None:
    """Record by record: nothing of one task leaks into another, fitted head weights included."""
    modes = {"select_modes": "fitted_heads,delimiter_span"}
    both = run_comparison("ablate_selector", config, {"tasks": ",".join(TASKS), **modes})
    for i, task in enumerate(TASKS):
        alone = run_comparison("ablate_selector", config, {"tasks": task, **modes})
        for left, right in zip(both[2 * i : 2 * i + 2], alone, strict=True):
            assert list(left.records.on) == list(right.records.on)
            assert list(left.records.off) == list(right.records.off)


def test_killed_in_the_second_task_and_resumed_it_is_the_same(config: Phase2Config, store: str) -> None:
    lists = {"tasks": ",".join(TASKS), "select_modes": "attention_diversity_span,delimiter_span"}

    def work(resumed: Any = None) -> None:
        run_comparison("ablate_selector", config, lists, resumed)

    def left() -> dict[str, str]:
        """Results of the only comparison there is, with stand-ins for the ids of its nested runs."""
        run_id = parent_folder().name
        nested = find_resumable(run_id).children.values()
        files = left_by(run_id)
        for i, child in enumerate(nested):
            files = {name: text.replace(child, f"RUN{i}") for name, text in files.items()}
        return files

    assert forked(work) == 0
    undisturbed = left()
    shutil.rmtree(OUTPUTS)

    def killed_after_the_third_unit() -> None:
        real, appended = points.JOURNAL_APPEND.real, list[str]()

        def append(self: Journal, unit: str, *finished: Any) -> None:
            real(self, unit, *finished)
            appended.append(unit)
            if len(appended) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        points.JOURNAL_APPEND.replace(append)

    assert forked(work, killed_after_the_third_unit) == -signal.SIGKILL
    run_id = parent_folder().name
    assert [unit["unit"] for unit in journal_units(run_id)][2:] == ["other_lookup/unit/00000"]
    assert forked(lambda: work(find_resumable(run_id))) == 0
    resumed = left()
    assert resumed.keys() == undisturbed.keys()
    assert {name for name in resumed if resumed[name] != undisturbed[name]} == set()


def test_tasks_and_a_file_contradict_each_other(config: Phase2Config, store: str, tmp_path: Path) -> None:
    its = tiny.config("x", "data.on_path=mine.jsonl")
    with pytest.raises(ConfigError, match=r"tasks = 'symbol_lookup, other_lookup' .* data\.on_path = 'mine\.jsonl'"):
        run_comparison("ablate_selector", its, LISTS)
