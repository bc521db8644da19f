"""The estimate before a grid: its count is held to what really goes through the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedkv.conditions import build
from cedkv.estimate import Work, duration, first_passes, seconds, work
from cedkv.eval_phase2 import plan, run
from cedkv.samples.load import load_samples
from tests import tiny


def test_count_is_that_of_the_model(llama_folder: Path) -> None:
    """Guards against a part of the engine (repeats, causal drops, Gate A, random trials) that the estimate forgets.

    Tokens are counted where the model gets them, padding aside. Kept tokens are counted at their most, so the estimate may
    be a little high.
    """
    config, lm = tiny.load(llama_folder, "eval.on_samples=8", "eval.off_samples=9", "eval.repro_runs=3", "prefix_len=32")
    conditions = build("ablate_selector", config, {})
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions)
    units = plan(conditions, 8, 9, "2")
    seen: list[int] = []

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        width = given["input_ids"].shape[1]
        seen.append(int(given["attention_mask"][:, -width:].sum()))

    lm.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    for _ in run(lm, conditions, samples, units, "2", lambda *_: None):
        pass
    expected = work(conditions, units, samples)
    assert sum(seen) <= expected.tokens <= 1.1 * sum(seen)
    assert 0.9 * len(seen) <= expected.passes <= 1.1 * len(seen)
    teacher, base = first_passes(conditions, units[0], samples)
    assert seen[0] == teacher.tokens
    assert base.tokens in seen[1:]


def test_time_is_tokens_and_passes_by_the_speed_of_two_measurements() -> None:
    """2 ms a token and 0.1 s a pass."""
    teacher, base = (Work(1000, 1), 2.1), (Work(100, 1), 0.3)
    assert seconds(Work(5000, 20), teacher, base) == pytest.approx(5000 * 0.002 + 20 * 0.1)


@pytest.mark.parametrize("slow_base", [0.0, 5.0])
def test_a_hiccup_in_a_measurement_gives_no_negative_time(slow_base: float) -> None:
    """A base pass slower than the teacher's would make tokens cost less than nothing."""
    found = seconds(Work(5000, 20), (Work(1000, 1), 2.0), (Work(100, 1), slow_base))
    assert found >= 5.0 * (slow_base == 0)
    assert found >= 0
    assert seconds(Work(5000, 5), (Work(100, 1), 1.0), (Work(100, 1), 1.0)) == pytest.approx(50.0)


@pytest.mark.parametrize(("time", "words"), [(0.2, "1 seconds"), (89, "89 seconds"), (1500, "25 minutes"), (9000, "2.5 hours")])
def test_time_in_words(time: float, words: str) -> None:
    assert duration(time) == words
