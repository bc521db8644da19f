"""How good selections and scores are: by hand, against eager attention, and each pass made once."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from cedkv.conditions import Condition
from cedkv.core.seeding import rng_for
from cedkv.core.values import OnEpisode, OnSample, Record, Selection
from cedkv.inference import ablation, quality
from cedkv.inference.quality import MaskedAnswers, gold_coverage, lds
from cedkv.tasks.load import load_samples
from cedkv.units import evaluations, plan
from tests.support import tiny
from tests.support.making import kinds

SMALL = ("eval.on_samples=4", "eval.off_samples=4", "eval.gate_a_samples=1", "eval.lds_masks=8")
GRID = {
    "plain": (),
    "shrunk": ("prefix.padding_mode=shrink_to_selected",),
    "drop": ("select.mode=causal_drop_span",),
    "wrong": ("select.mode=wrong_demo",),
    "drawn": ("select.mode=random_span",),
    "short": ("select.span_len=2", "select.span_budget=6"),
}


def sample(letters: str = "biiiiii", gold: tuple[int, int] | None = (2, 6)) -> OnSample:
    episode = OnEpisode("s", "", "", "", ())
    return OnSample(episode, tuple(range(len(letters))), (1,), (1,), kinds(letters), gold)


def of_type(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if kind in (record["type"], record.get("kind"))]


@pytest.mark.parametrize(("kept", "share"), [((0, 1), 0.0), ((0, 3, 4, 6), 0.5), ((0, 2, 3, 4, 5), 1.0)])
def test_gold_coverage_is_the_share_that_is_kept(kept: tuple[int, ...], share: float) -> None:
    assert gold_coverage(sample(), Selection((), kept)) == share
    assert gold_coverage(sample(gold=None), Selection((), kept)) is None


def test_lds_is_the_rank_correlation_over_masks() -> None:
    """BOS, then pieces of two tokens whose scores sum to 3, 7 and 11."""
    visible = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)  # 3, 7, 10, 11
    worth = np.array([99.0, 1, 2, 3, 4, 5, 6])
    rising = MaskedAnswers(visible, 0, np.array([-4.0, -3.0, 0.0, 9.0]))
    assert lds(worth, rising, sample(), 2) == pytest.approx(1)
    assert lds(-worth, rising, sample(), 2) == pytest.approx(-1)
    mixed = MaskedAnswers(visible, 0, np.array([-3.0, -4.0, 0.0, -1.0]))
    assert lds(worth, mixed, sample(), 2) == pytest.approx(spearmanr([3, 7, 10, 11], [-3, -4, 0, -1]).statistic)


def test_lds_needs_ranks_on_both_sides() -> None:
    visible = np.array([[1, 0, 1], [0, 1, 0]], dtype=bool)
    answers = MaskedAnswers(visible, 0, np.array([1.0, 2.0]))
    assert lds(None, answers, sample(), 2) is None
    assert lds(np.zeros(7), answers, sample(), 2) is None
    assert lds(np.arange(7.0), MaskedAnswers(visible, 0, np.array([1.0, 1.0])), sample(), 2) is None


def test_masks_with_the_same_scores_are_tied() -> None:
    """In floating point 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1; the order of the tokens must not rank masks."""
    visible = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]], dtype=bool)
    worth = np.array([0.0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1])
    answers = MaskedAnswers(visible, 0, np.array([1.0, 2.0, 0.0]))
    assert lds(worth, answers, sample(), 1) == pytest.approx(math.sqrt(3) / 2)


def test_first_token_without_bos_does_not_count() -> None:
    """An attention sink holds most of the score; with it the rank correlation would be -1."""
    visible = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    answers = MaskedAnswers(visible, 0, np.array([1.0, 2.0, 3.0]))
    assert lds(np.array([99.0, 1, 2, 2, 3, 3]), answers, sample("iiiiii"), 2) == pytest.approx(1)


@pytest.fixture(scope="module")
def grid(llama_folder: Path) -> dict[str, list[Record]]:
    return tiny.grid_records(llama_folder, GRID, *SMALL)


def test_who_has_which_numbers(grid: dict[str, list[Record]]) -> None:
    """A prefix of another demo has none, whatever it keeps; what ranks no tokens has no LDS."""
    expected = {key: {"gold_coverage", "lds", "comprehensiveness"} for key in GRID}
    expected |= {"wrong": set(), "drawn": {"gold_coverage", "comprehensiveness"}}
    for key, records in grid.items():
        for record in of_type(records, "on"):
            assert record.keys() & {"gold_coverage", "lds", "comprehensiveness"} == expected[key]
            assert len(record["gold_coverage_random"]) == 2


def test_conditions_of_one_span_length_share_masks_and_answers(grid: dict[str, list[Record]]) -> None:
    chosen = {key: of_type(records, "selection") for key, records in grid.items()}
    for key in ("shrunk", "drop", "drawn"):
        for left, right in zip(chosen["plain"], chosen[key], strict=True):
            assert left["lds_visible"] == right["lds_visible"]
            assert left["lds_log_odds"] == right["lds_log_odds"]
    for left, right in zip(chosen["plain"], chosen["short"], strict=True):
        assert left["lds_visible"] != right["lds_visible"]
        pieces = math.ceil(len(left["demo_token_ids"]) / 4)
        drawn = rng_for(42, "lds", 0, left["sample_id"]).random((8, pieces)) < 0.5
        assert left["lds_visible"] == [np.flatnonzero(mask).tolist() for mask in drawn]
    assert "lds_visible" not in chosen["wrong"][0]


def test_without_masks_no_pass_is_made(llama_folder: Path) -> None:
    """The default of a single run: coverage is free, the rest is not."""
    steps: list[tuple[str, int]] = []
    found = tiny.grid_records(llama_folder, {"run": ()}, *SMALL[:3], steps=lambda *step: steps.append(step))
    for record in of_type(found["run"], "on"):
        assert record.keys() & {"gold_coverage", "lds", "comprehensiveness"} == {"gold_coverage"}
    assert not {"lds_visible", "lds_log_odds", "lds_token_id"} & of_type(found["run"], "selection")[0].keys()
    assert not {"LDS masks", "comprehensiveness"} & {arm for arm, _ in steps}


def test_every_pass_is_made_once_and_announced(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers under masks once per span length, hidden spans once per selection; a repetition makes neither again."""
    rows: Counter[str] = Counter()
    real = ablation.next_token_logprobs

    def count(name: str) -> Any:
        def run(lm: Any, queries: list[Any], *rest: Any) -> Any:
            rows[name] += len(queries)
            return real(lm, queries, *rest)

        return run

    monkeypatch.setattr(quality, "next_token_logprobs", count("hidden spans"))
    monkeypatch.setattr(ablation, "next_token_logprobs", count("masks"))
    announced: Counter[str] = Counter()

    def step(arm: str, n: int) -> None:
        announced[arm] += n

    modes = {key: GRID[key] for key in ("plain", "shrunk", "wrong", "drawn", "short")}
    tiny.grid_records(llama_folder, modes, *SMALL, "eval.repro_runs=3", steps=step)
    assert announced["LDS masks"] == rows["masks"] == 4 * 8 * 2
    assert announced["comprehensiveness"] == 4 * 4
    assert rows["hidden spans"] == 4 * 3  # the padding changes no selection
    conditions = [Condition(key, tiny.config(llama_folder, *SMALL, "eval.repro_runs=3", *own)) for key, own in modes.items()]
    config, lm = tiny.load(llama_folder, *SMALL)
    on = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary).on
    assert sum(announced.values()) == sum(evaluations(conditions, unit, "2", on) for unit in plan(conditions, 4, 4, "2", 4))


def test_short_demos_have_fewer_masks_than_are_drawn(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces have four masks: each runs once, and the same masks have the very same answers."""
    rows: list[int] = []
    real = ablation.next_token_logprobs

    def run(lm: Any, queries: list[Any], *rest: Any) -> Any:
        rows.append(len(queries))
        return real(lm, queries, *rest)

    monkeypatch.setattr(ablation, "next_token_logprobs", run)
    long_spans = ("select.span_len=40", "select.span_budget=1", "prefix_len=64", "data.pairs=4", "eval.lds_masks=64")
    found = tiny.records(llama_folder, *SMALL[:3], *long_spans)
    assert max(rows) <= 4
    for chosen in of_type(found, "selection"):
        answers: dict[str, set[float]] = {}
        for visible, odds in zip(chosen["lds_visible"], chosen["lds_log_odds"], strict=True):
            answers.setdefault(str(visible), set()).add(odds)
        assert len(chosen["lds_log_odds"]) == 64
        assert all(len(odds) == 1 for odds in answers.values())


def test_scores_are_the_selectors_own_where_it_ranks_tokens(grid: dict[str, list[Record]]) -> None:
    chosen = {key: of_type(records, "selection") for key, records in grid.items()}
    assert {key: records[0]["scores_of"] for key, records in chosen.items()} == {
        **dict.fromkeys(GRID, "selector"), "drawn": "attention"
    }  # fmt: skip
    assert chosen["plain"][0]["scores"] == chosen["drawn"][0]["scores"] != chosen["drop"][0]["scores"]


@pytest.mark.parametrize("window", ["all", "2"])
def test_attention_to_gold_tokens_is_eager_attention(llama_folder: Path, window: str) -> None:
    """The sum over gold tokens of the mean over rows, by layer and head, summed over the samples of all units: of every
    layer, whichever the selector reads.
    """
    found = tiny.records(llama_folder, *SMALL[:3], f"select.query_window={window}", "runtime.batch_size=2",
                         "layer_scope.selection=[1,3]")  # fmt: skip
    heads = of_type(found, "heads")
    assert [(record["n"], record["layers"], record["window"]) for record in heads] == [
        (2, [0, 1, 2, 3], None if window == "all" else 2)
    ] * 2
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, attn_implementation="eager")
    total = np.zeros((4, 4))
    for chosen in of_type(found, "selection"):
        demo, (start, end) = chosen["demo_token_ids"], chosen["gold_tokens"]
        with torch.inference_mode():
            maps = model(torch.tensor([demo + chosen["query_token_ids"]]), output_attentions=True).attentions
        for layer in range(4):
            rows = maps[layer][0, :, len(demo) :, start:end]
            total[layer] += rows[:, 0 if window == "all" else -2 :].mean(dim=1).sum(dim=1).numpy()
    assert np.sum([record["total"] for record in heads], axis=0) == pytest.approx(total, abs=1e-5)


def test_attention_to_gold_tokens_is_of_what_a_condition_reads(llama_folder: Path) -> None:
    """The mean of its own rows in every layer, however its score pools; not of other queries or of what is no attention."""
    conditions = {
        "norm": ("select.mode=key_norm",),
        "max": ("select.row_pooling=max",),
        "other": ("select.mode=transfer_span",),
        "own": ("layer_scope.selection=[2]",),
        "same": ("select.mode=calibrated_attention", "layer_scope.selection=[2,3]"),
        "last": ("select.mode=tova",),
    }
    found = tiny.grid_records(llama_folder, conditions, *SMALL[:3])
    heads = {key: of_type(records, "heads") for key, records in found.items()}
    assert {key: (records[0]["window"], records[0]["layers"]) for key, records in heads.items() if records} == {
        "max": (None, [0, 1, 2, 3]), "own": (None, [0, 1, 2, 3]), "same": (None, [0, 1, 2, 3]), "last": (1, [0, 1, 2, 3])
    }  # fmt: skip
    assert heads["own"][0]["total"] == heads["same"][0]["total"] == heads["max"][0]["total"] != heads["last"][0]["total"]
