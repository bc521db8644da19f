"""Gold coverage, LDS and comprehensiveness of runs on tiny models, computed again by plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.oracle.outside import Rules
from tests.oracle.outside_run import Comparison, compare
from tests.oracle.test_outside_recomputation import RULES, RUN, evaluate, plain

__all__ = ["evaluate"]

JUDGED = replace(RULES, lds_masks=6, query_window=500, free=True)
MODES = (
    "attention_diversity_span", "causal_drop_span", "context_cite", "key_norm", "full_demo", "random_span", "transfer_span",
    "wrong_demo",
)  # fmt: skip


def compared(folder: Path, rules: Rules) -> Comparison:
    found = compare(RUN, plain(folder), rules)
    assert found.problems == []
    return found


@pytest.mark.parametrize("mode", MODES)
def test_numbers_follow_from_the_files(usual_folder: Path, evaluate: Callable[..., None], mode: str) -> None:
    """Also a prefix of another demo, which has none of them, and selectors that rank no tokens, which have no LDS."""
    evaluate(usual_folder, f"select.mode={mode}", "eval.lds_masks=6", "prefix_len=100")
    worst = compared(usual_folder, JUDGED).worst
    numbers = {"gold_coverage", "log-odds", "comprehensiveness", "lds"}
    if mode == "wrong_demo":
        assert not numbers & worst.keys()
        return
    assert numbers & worst.keys() == numbers - ({"lds"} if mode in ("full_demo", "random_span") else set())
    assert worst["gold_coverage"] == 0
    assert worst.get("lds", 0.0) < 1e-9
    assert max(worst["log-odds"], worst["comprehensiveness"], worst["metric"]) < 1e-4


def test_bos_is_always_visible(bos_folder: Path, evaluate: Callable[..., None]) -> None:
    evaluate(bos_folder, "eval.lds_masks=6", "select.keep_sink=2", "select.span_len=5", "select.span_budget=2")
    worst = compared(bos_folder, Rules(5, 2, 4, keep_sink=2, query_window=500, lds_masks=6)).worst
    assert max(worst["log-odds"], worst["comprehensiveness"]) < 1e-4


def _other_masks(run: dict[str, Any]) -> None:
    for chosen in run["on"]:
        chosen["lds_visible"].append(chosen["lds_visible"].pop(0))


def _other_scores(run: dict[str, Any]) -> None:
    for chosen in run["on"]:
        chosen["scores"].reverse()


def _other_spans(run: dict[str, Any]) -> None:
    for chosen in run["on"]:
        chosen["spans"] = chosen["random"][0]["spans"]


def _other_gold(run: dict[str, Any]) -> None:
    for chosen in run["on"]:
        chosen["gold_tokens"][0] -= 3


DAMAGES = {_other_masks: "log-odds", _other_scores: "lds", _other_spans: "comprehensiveness"}


def test_files_that_say_something_else_are_noticed(usual_folder: Path, evaluate: Callable[..., None]) -> None:
    evaluate(usual_folder, "eval.lds_masks=6", "prefix_len=100")
    path = RUN / "artifacts" / "phase2_selection.json"
    untouched = path.read_text()
    for damage, kind in DAMAGES.items():
        run = json.loads(untouched)
        damage(run)
        path.write_text(json.dumps(run))
        assert compare(RUN, plain(usual_folder), JUDGED).worst[kind] > 1e-2, damage.__name__
    run = json.loads(untouched)
    _other_gold(run)
    path.write_text(json.dumps(run))
    assert any("gold coverage" in problem for problem in compare(RUN, plain(usual_folder), JUDGED).problems)
