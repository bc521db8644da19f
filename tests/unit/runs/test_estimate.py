"""The estimate before a grid: its count is held to what really goes through the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedkv.conditions import build
from cedkv.eval_phase2 import plan_samples, run
from cedkv.runs.estimate import duration, teacher_tokens, tokens
from cedkv.tasks.load import load_samples
from tests.support import tiny


def test_count_is_that_of_the_model(llama_folder: Path) -> None:
    """Guards against a part of the engine (repeats, causal drops, Gate A, random trials) that the estimate forgets.

    Tokens are counted where the model gets them, padding aside. Kept tokens are counted at their most, so the estimate may
    be a little high.
    """
    config, lm = tiny.load(llama_folder, "eval.on_samples=8", "eval.off_samples=9", "eval.repro_runs=3", "prefix_len=32")
    conditions = build("ablate_selector", config, {})
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    units = plan_samples(conditions, samples, "2")
    seen: list[int] = []

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        width = given["input_ids"].shape[1]
        seen.append(int(given["attention_mask"][:, -width:].sum()))

    lm.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    for _ in run(lm, conditions, samples, units, "2", lambda *_: None):
        pass
    assert sum(seen) <= tokens(conditions, units, samples) <= 1.1 * sum(seen)
    assert seen[0] == teacher_tokens(units[0], samples)


@pytest.mark.parametrize(("time", "words"), [(0.2, "1 seconds"), (89, "89 seconds"), (1500, "25 minutes"), (9000, "2.5 hours")])
def test_time_in_words(time: float, words: str) -> None:
    assert duration(time) == words
