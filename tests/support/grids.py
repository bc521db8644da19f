"""Finished grids of conditions without a model, whose means are chosen so that every standard question has an answer."""

from __future__ import annotations

import numpy as np

from cedkv.analysis.results import ConditionResult
from tests.support import making

N = 40
RNG = np.random.default_rng(1)
NOISE = RNG.normal(0, 0.05, N)


def around(mean: float) -> list[float]:
    return (mean + NOISE).tolist()


def some(share: float) -> list[bool]:
    return [i < share * N for i in range(N)]


def modes(*names: str) -> list[dict[str, str]]:
    return [{"select.mode": name} for name in names]


def standard(**kl: float) -> list[ConditionResult]:
    """A grid with every standard question; ``kl`` replaces the means by position (c0, c1, ...)."""
    settings = [
        *modes("attention_diversity_span", "transfer_span", "wrong_demo", "oracle_span", "full_demo"),
        {"select.span_budget": "1"}, {"select.span_budget": "8"},
        {"select.span_len": "4", "select.span_budget": "8", "select.min_span_distance": "4"},
        {"prefix.kv_source": "gather"}, {"select.keep_sink": "4"},
        {"prefix.kv_source": "gather", "select.keep_sink": "4"}, {"injection.positioning_mode": "absolute"},
    ]  # fmt: skip
    means = [0.5, 0.6, 2.2, 0.4, 1e-9, 1.5, 0.3, 0.8, 1.2, 0.45, 0.5, 0.7]
    given = [
        {"kl": around(kl.get(f"c{i}", mean)) if mean > 0.01 else mean, "correct": some(0.6), "random": some(0.2),
         "off": around(0.2 + 0.05 * i)}
        for i, mean in enumerate(means)
    ]  # fmt: skip
    given[2]["correct"] = some(0.0)
    given[8]["off"] = around(0.8)  # gather without sinks
    return making.grid(*zip(settings, given, strict=True), n=N)
