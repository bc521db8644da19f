"""Every configuration that is shipped runs end to end on a tiny model: gates decided, records whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.tasks.load import load_samples
from tests.support import tiny
from tests.support.runs import run_phase2

pytestmark = pytest.mark.usefixtures("without_mlflow")

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("runtime.device=cpu", "eval.on_samples=6", "eval.off_samples=4", "eval.gate_a_samples=2", "eval.n_random_trials=2",
         "eval.repro_runs=2")  # fmt: skip


def run(path: Path, folder: Path) -> tuple[Phase2Config, Any, list[dict[str, Any]]]:
    """Configuration, results and the selections' records."""
    config = resolve(path, [f"model.id={folder}", *SIZES])
    results = run_phase2(config)
    (made,) = Path("outputs").iterdir()
    return config, results, json.loads((made / "artifacts" / "phase2_selection.json").read_text())["on"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_run(path: Path, llama_folder: Path) -> None:
    config, results, selections = run(path, llama_folder)
    assert results.verdicts["gateA"], results.checks
    assert {check.gate for check in results.checks} == {"A", "B", "precondition"}
    undecided = {check.name for check in results.checks if check.verdict == "insufficient"}
    assert undecided <= {"select_vs_random"}, "random weights answer nothing, so these two arms have nothing to compare"
    assert len(selections) == config.eval.on_samples
    assert all(len(record["kept_tokens"]) <= config.prefix_len for record in selections)


def test_recommended_keeps_whole_shots_that_lead(llama_folder: Path) -> None:
    """Shots of the demo as the task cut it, the best one among them; the attention shown is that of two middle layers."""
    config, _, selections = run(CONFIGS / "recommended.yaml", llama_folder)
    assert config.select.params == {"min_lead": 0.6}
    assert config.select.value_weighting == "output_norm"
    _, lm = tiny.load(llama_folder)
    assert lm.selection_layers(config.layer_scope.selection) == {1, 2}
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary).on
    kept = 0
    for sample, record in zip(samples, selections, strict=True):
        assert sample.sample_id == record["sample_id"]
        spans = [(span["start"], span["end"]) for span in record["spans"]]
        assert sample.shot_tokens is not None
        assert set(spans) <= set(sample.shot_tokens)
        tokens = {(start, end): record["scores"][max(1, start) : end] for start, end in sample.shot_tokens}
        scores = {shot: sum(own) / len(own) for shot, own in tokens.items()}
        best, mean = max(scores.values()), sum(scores.values()) / len(scores)
        assert max(scores, key=scores.__getitem__) in spans
        assert min(scores[span] for span in spans) - mean >= 0.6 * (best - mean) - 1e-9
        kept += len(spans)
    assert kept >= len(samples)
