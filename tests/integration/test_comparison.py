"""A comparison from lists to MLflow: parent, nested runs, tables, tags; each condition as if it had run by itself; a crash."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from cedkv.config.options import COMPARISONS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import NumericsError
from cedkv.report.text import aligned, console_note
from cedkv.runs.outputs import OUTPUTS
from cedkv.runs.resolved import ResolvedRun
from entrypoints import ablate_selector, compare_positioning
from tests.support import making, tiny
from tests.support import patch_points as points
from tests.support.runs import run_comparison, run_phase2

MODES = ("attention_diversity_span", "causal_drop_span", "full_demo", "oracle_span", "wrong_demo")
LISTS = {"select_modes": ",".join(MODES)}
GATES = ("gateA", "gateB", "phase2")


def children_of(parent: str) -> list[Any]:
    """Nested runs, the oldest first."""
    experiment = mlflow.get_run(parent).info.experiment_id
    found = mlflow.MlflowClient().search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(found, key=lambda run: run.info.start_time)


def only_parent(comparison: str) -> Any:
    experiment = mlflow.get_experiment_by_name("cedkv").experiment_id
    found = mlflow.MlflowClient().search_runs(
        [experiment], f"tags.comparison = '{comparison}'", order_by=["attributes.start_time DESC"]
    )
    return next(run for run in found if "mlflow.parentRunId" not in run.data.tags)


@pytest.fixture
def config(llama_folder: Path) -> Phase2Config:
    return tiny.config(llama_folder)


def test_parent_and_nested_runs(config: Phase2Config, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What people find in the UI: names, tags, tables at the root, files, and each condition a full run in its own right."""
    results = run_comparison("ablate_selector", config, LISTS)
    parent = only_parent("ablate_selector")
    said = capsys.readouterr()
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "ablate_selector · 5 conditions · seed 42"
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(parent.info.run_id)}
    assert files == {
        "artifacts", "conditions.json", "comparisons.json", "comparison.json", "config.yaml", "figures", "report.html",
        "summary.md", "accuracy_by_condition.png", "kl_to_teacher_by_condition.png",
    }  # fmt: skip
    best = next((r for r in results if r.label == parent.data.tags["best"]), None)
    assert best is not None
    assert not best.reference
    assert parent.data.tags["best.run_id"] == best.run_id
    untaught = "nothing is decided about the selection, as the teacher itself gains 0 on base; "
    assert parent.data.tags["best.rule"].startswith(f"{untaught}highest accuracy, ")
    assert parent.data.tags["teacher_gain"] == "fail"
    assert parent.data.tags["samples.unusable"] == "0"
    assert "note     the teacher itself gains 0 on base (limit 0.1): this model does not learn" in said.out
    assert parent.data.tags["factors"] == "select.mode"
    assert parent.data.tags["gateA_passed"] == "5 of 5"
    assert parent.data.params["phase2.select.mode"] == "attention_diversity_span"
    assert (parent.data.tags["task"], parent.data.tags["model"]) == ("symbol_lookup", Path(config.model.id).name)
    assert "selector" not in parent.data.tags
    page = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith(f"[page]({page}/report.html) · [conditions]({page}/conditions.json) · ")
    assert note.split("\n\n")[1].startswith("**The teacher itself gains 0 on base"), "the UI shows the run's name above"
    assert len(note) <= 8000
    mlflow.set_experiment("cedkv")
    table = mlflow.load_table("conditions.json", run_ids=[parent.info.run_id])
    assert sorted(table["condition"]) == sorted(r.label for r in results)
    assert list(table["kind"][:2]) == ["candidate", "candidate"], "reference points come last"
    assert dict(zip(table["condition"], table["kind"], strict=True)) == {r.label: r.role for r in results}
    query = dict(zip(table["condition"], table["query"], strict=True))
    assert query == {r.label: "query-agnostic" if r.label == "full_demo" else "query-aware" for r in results}
    assert table["rel_kl_to_teacher"].dtype.kind == "f", "a number that is text can be neither sorted nor drawn"
    assert set(mlflow.load_table("comparisons.json", run_ids=[parent.info.run_id])) >= {"left", "right", "p_holm", "verdict"}

    nested = children_of(parent.info.run_id)
    assert [run.info.run_id for run in nested] == [r.run_id for r in results]
    for run, result in zip(nested, results, strict=True):
        assert run.info.status == "FINISHED"
        assert run.info.run_name == result.label
        assert {gate: run.data.tags[gate] for gate in GATES} == {
            gate: "pass" if passed else "fail" for gate, passed in result.results.verdicts.items()
        }
        assert run.data.tags["gateB.on_gain"] in ("pass", "fail")
        assert (run.data.tags["comparison"], run.data.tags["condition"]) == ("ablate_selector", result.key)
        assert run.data.params["phase2.select.mode"] == result.config.select.mode
        finite = {name: value for name, value in result.results.metrics.items() if value is not None}
        assert {name: run.data.metrics[name] for name in finite} == pytest.approx(finite)
        assert {item.tags[0].value for item in run.inputs.dataset_inputs} == {"on", "off"}
        artifacts = {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
        assert artifacts >= {
            "phase2_on_samples.json", "phase2_off_samples.json", "report_phase2.json", "metrics.jsonl", "config.yaml",
            "report.html", "artifacts", "accuracy.png", "kl_by_sample.png", "off_delta.png",
        }  # fmt: skip
        assert run.data.tags["selector"] == result.config.select.mode
    size = re.search(
        r"5 conditions on 6 ON samples and 8 OFF prompts: [1-9][\d,]* evaluations \(sample x arm\) at most", said.err
    )
    assert size is not None
    assert size.start() < said.err.index("unit/00000 done (1 of 2 units, about ")
    assert all(result.label in said.out for result in results)
    assert f"best     {best.label}" in said.out


def test_a_nested_run_is_what_a_separate_evaluation_gives(config: Phase2Config, store: str) -> None:
    """Sample by sample, to the floor: nothing of one condition may leak into another."""
    _, chosen = run_comparison("ablate_selector", config, {"select_modes": "wrong_demo,causal_drop_span"})
    run_phase2(chosen.config)
    experiment = mlflow.get_experiment_by_name("cedkv").experiment_id
    alone = mlflow.MlflowClient().search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=1)[0]
    assert alone.info.run_id != chosen.run_id
    mlflow.set_experiment("cedkv")
    for name in ("phase2_on_samples.json", "phase2_off_samples.json"):
        left, right = (mlflow.load_table(name, run_ids=[run]) for run in (chosen.run_id, alone.info.run_id))
        pd.testing.assert_frame_equal(left, right, check_exact=False, rtol=1e-6, atol=1e-7)
    tags = (mlflow.get_run(run).data.tags for run in (chosen.run_id, alone.info.run_id))
    left_tags, right_tags = ({k: v for k, v in found.items() if k.startswith("gate")} for found in tags)
    assert left_tags == right_tags


def test_files_of_the_parent_say_the_same(config: Phase2Config, store: str) -> None:
    results = run_comparison("compare_positioning", config, {"kv_sources": "prefill", "keep_sinks": "0"})
    folder = OUTPUTS / only_parent("compare_positioning").info.run_id
    content = json.loads((folder / "comparison.json").read_text())
    assert {row["condition"]: row["run_id"] for row in content["conditions"]} == {r.label: r.run_id for r in results}
    assert [row["verdict"] for row in content["equal_on_paper"]] == ["pass", "pass"]
    summary, page = (folder / "summary.md").read_text(), (folder / "report.html").read_text()
    for row in content["equal_on_paper"]:
        assert row["left"] in summary
        assert f"{row['left']} = {row['right']}" in page
    assert [f"figures/{path.name}" for path in sorted((folder / "figures").iterdir())][:2] == [
        "figures/01_accuracy_by_condition.png", "figures/02_kl_to_teacher_by_condition.png"
    ]  # fmt: skip


def test_a_crash_leaves_no_run_running(config: Phase2Config, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of publishing: nested runs that are done stay FINISHED, the others and the parent are FAILED."""
    calls: list[Any] = []

    def breaks(real: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise NumericsError("planted")
        return real(*arguments)

    points.REPORT_CONDITION.wrap(monkeypatch, breaks)
    with pytest.raises(NumericsError, match="planted"):
        run_comparison("ablate_selector", config, {"select_modes": "random_span,delimiter_span,sink_recent"})
    parent = only_parent("ablate_selector")
    assert parent.info.status == "FAILED"
    assert [run.info.status for run in children_of(parent.info.run_id)] == ["FINISHED", "FAILED", "FAILED"]
    assert mlflow.active_run() is None


def test_a_condition_the_model_cannot_do_is_rejected_before_anything_is_computed(
    config: Phase2Config, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 9 of 4; no nested run is left behind."""
    points.EVALUATE.replace(lambda *_: pytest.fail("the grid was started"), monkeypatch)
    with pytest.raises(Exception, match=r"layer_scope\.selection"):
        run_comparison("ablate_selector", config, {"selection_scopes": "all,[9]"})
    parent = only_parent("ablate_selector")
    assert parent.info.status == "FAILED"
    assert children_of(parent.info.run_id) == []


def test_notes_on_the_console_are_what_must_not_be_missed() -> None:
    fine: list[dict[str, Any]] = [{"here": "holds"}, {"here": "not resolved"}, {"here": "not refuted"}, {"verdict": "pass"}]
    assert [console_note(row) for row in fine] == [None] * 4
    broken = {"relation": "a > b", "here": "does not hold", "figures": "1 against 2"}
    assert console_note(broken) == "note     does not hold here: a > b (1 against 2)"
    unequal = {"left": "a", "right": "b", "quantity": "KL", "largest": 0.1, "verdict": "fail"}
    assert console_note(unequal) == "note     not equal: a and b, KL 0.1"


def test_a_figure_that_could_not_be_computed_is_a_dash_on_the_console() -> None:
    results = making.grid(({}, {}), ({"select.mode": "delimiter_span"}, {}))
    results[1].results.metrics["phase2_on_acc_student_random_mean"] = None
    results[1].results.metrics["phase2_delta_on_mean_select"] = math.nan
    lines = aligned(results).splitlines()
    assert lines[-1].count("–") == 2
    assert "nan" not in "".join(lines)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the comparison that notes what it was asked for; its conditions have ``verdicts``."""
    noted = SimpleNamespace(calls=[], verdicts=[dict.fromkeys(GATES, True), {"gateA": True, "gateB": False, "phase2": False}])

    def run(resolved: ResolvedRun) -> Any:
        noted.calls.append((resolved.comparison, resolved.config, resolved.manifest.lists))
        return [SimpleNamespace(results=SimpleNamespace(verdicts=verdict)) for verdict in noted.verdicts]

    points.RUN.replace(run, monkeypatch)
    return noted


def invoke(command: Any, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_lists_and_options_reach_the_comparison(runs: SimpleNamespace) -> None:
    found = invoke(ablate_selector.main, "--select_modes", "all", "--span_budgets", "1,2", "--seed", "7")
    assert found.exit_code == 0
    ((name, made, lists),) = runs.calls
    assert (name, made.seed) == ("ablate_selector", 7)
    assert lists == dict.fromkeys(COMPARISONS["ablate_selector"]) | {"select_modes": "all", "span_budgets": "1,2"}
    assert invoke(compare_positioning.main, "--kv_sources", "gather").exit_code == 0
    assert runs.calls[1][2]["kv_sources"] == "gather"


def test_exit_code_wants_every_gate_a_and_the_first_gate_b(runs: SimpleNamespace) -> None:
    """Points of reference are meant to fail Gate B; a failing Gate A anywhere is a fault."""
    strict = ("--fail_on_gate", "true")
    assert invoke(ablate_selector.main, *strict).exit_code == 0
    runs.verdicts[1]["gateA"] = False
    assert invoke(ablate_selector.main, *strict).exit_code == 1
    assert invoke(ablate_selector.main).exit_code == 0
    runs.verdicts[1]["gateA"], runs.verdicts[0]["phase2"] = True, False
    assert invoke(ablate_selector.main, *strict).exit_code == 1


def test_a_misspelled_list_has_a_near_match() -> None:
    found = invoke(ablate_selector.main, "--select_mods", "all")
    assert found.exit_code == 2
    assert "--select_modes" in found.output
    found = invoke(ablate_selector.main, "--select_modes", "attention_diversity_span,dlimiter_span")
    assert found.exit_code == 2
    assert "did you mean 'delimiter_span'?" in found.output
