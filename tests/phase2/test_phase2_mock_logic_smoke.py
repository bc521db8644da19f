"""The whole of phase 2 on a tiny random model: not a mock of any part, only a model too small to say anything."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml

from cedkv.config.resolve import resolve
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.runs import run_phase2


@pytest.fixture
def finished(store: str, model_folder: Path) -> tuple[Path, object]:
    results = run_phase2(tiny.config(model_folder), "2")
    (folder,) = Path("outputs").iterdir()
    return folder, results


def test_everything_promised_is_written_and_logged(finished: tuple[Path, object], model_folder: Path) -> None:
    folder, _ = finished
    report = json.loads((folder / "report_phase2.json").read_text())
    selection = json.loads((folder / "artifacts/phase2_selection.json").read_text())
    prefixes = json.loads((folder / "artifacts/phase2_prefix_meta.json").read_text())
    runtime = json.loads((folder / "artifacts/hf_runtime_meta.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())["phase2"]
    assert resolve(folder / "config.yaml") == tiny.config(model_folder), "the resolved configuration runs again"

    names = ("teacher_incremental", "null_effect", "nonzero_effect", "roundtrip_rel_kl", "repro_tolerance",
             "keep_all_absolute", "padding_equivalence", "batch_consistency", "rotation_equivariance",
             "source_cache_unchanged", "roundtrip_exact", "attention_alone", "selection_rules", "kv_precision", "arithmetic",
             "left_alone", "off_alone", "off_further_alone", "random_is_another")  # fmt: skip
    assert {check["name"]: check["verdict"] for check in report["gates"] if check["gate"] == "A"} == dict.fromkeys(
        names, "pass"
    )
    for content in (report, selection, prefixes):
        assert content["positioning_mode"] == resolved["injection"]["positioning_mode"]
        assert content["padding_mode"] == resolved["prefix"]["padding_mode"]
    assert all("schema_version" in content for content in (report, selection, prefixes, runtime, *lines))
    assert [line["type"] for line in lines].count("sample") == 6 + 8
    assert lines[-1]["type"] == "run"
    assert [len(record["random"]) for record in selection["on"]] == [2] * 6
    assert {record["state_of"] for record in selection["off"]} == {record["sample_id"] for record in selection["on"]}

    run = mlflow.get_run(folder.name)
    assert run.info.status == "FINISHED"
    assert run.data.params["phase2.select.mode"] == "attention_diversity_span"
    assert run.data.tags["gateA"] == "pass"
    assert run.data.tags["gateB"] == report["verdicts"]["gateB"] in ("pass", "fail")
    assert run.data.tags["phase2"] == report["verdicts"]["phase2"]
    assert run.data.tags["gateB.on_gain"] in ("pass", "fail")
    assert run.data.metrics["phase2_on_acc_teacher"] == report["metrics"]["phase2_on_acc_teacher"]
    assert run.info.run_name == "attention_diversity_span · compact · seed 42"
    assert "| B | on_gain |" in run.data.tags["mlflow.note.content"]
    assert {item.tags[0].value for item in run.inputs.dataset_inputs} == {"on", "off"}
    client = mlflow.MlflowClient()
    assert {"phase2_on_samples.json", "phase2_off_samples.json", "report_phase2.json", "metrics.jsonl", "artifacts"} <= {
        item.path for item in client.list_artifacts(run.info.run_id)
    }
    mlflow.set_experiment("cedkv")
    table = mlflow.load_table("phase2_on_samples.json", run_ids=[run.info.run_id])
    assert table.columns[0] == "sample_id"
    assert len(table) == 6
    moved = mlflow.load_table("phase2_off_samples.json", run_ids=[run.info.run_id])
    assert len(moved) == 8
    assert all(isinstance(token, str) for name in ("token_base", "token_select") for token in [*table[name], *moved[name]])


def test_same_seed_same_records_other_seed_others(store: str, usual_folder: Path) -> None:
    lines = []
    for seed in (42, 42, 7):
        run_phase2(tiny.config(usual_folder, f"seed={seed}"), "2")
        newest = max(Path("outputs").iterdir(), key=lambda path: path.stat().st_mtime)
        lines.append((newest / "metrics.jsonl").read_text().splitlines()[:-1])
    first, again, other = lines
    assert again == first
    assert not set(other) & set(first)


def test_gate_a_alone(store: str, usual_folder: Path) -> None:
    """Phase 1.5 decides Gate A, tags nothing else, and runs no random arm and no OFF prompt."""
    results = run_phase2(tiny.config(usual_folder), "1.5")
    (folder,) = Path("outputs").iterdir()
    run = mlflow.get_run(folder.name)
    assert results.verdicts == {"gateA": True}
    assert run.data.tags["gateA"] == "pass"
    assert "gateB" not in run.data.tags
    report = json.loads((folder / "report_phase2.json").read_text())
    assert report["n_off"] == 0
    assert report["metrics"]["phase2_on_acc_student_random_mean"] is None


def test_crash_is_a_failed_run_that_keeps_what_it_had(store: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch breaks: the run is FAILED, and the first batch's samples are on disk and in MLflow."""
    calls = []

    def breaks(real: Callable[..., object], lm: object, demos: list[object], *rest: object) -> object:
        calls.extend([1] if len(demos) > 1 else [])  # Gate A reads samples alone
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return real(lm, demos, *rest)

    points.READ_TEACHER.wrap(monkeypatch, breaks)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_phase2(tiny.config(llama_folder), "2")
    (folder,) = Path("outputs").iterdir()
    run = mlflow.get_run(folder.name)
    assert run.info.status == "FAILED"
    assert run.data.tags["phase2"] == "pending"
    assert sum(1 for line in (folder / "metrics.jsonl").open() if '"kind": "on"' in line) == 4
    assert "metrics.jsonl" in {item.path for item in mlflow.MlflowClient().list_artifacts(folder.name)}
