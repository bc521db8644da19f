"""Paired comparisons over samples: bootstrap intervals for differences, an exact McNemar test for accuracy. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

from cedkv.digest import generator
from cedkv.types import Record

RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """Mean paired difference ``left - right`` with its 95 % interval; ``p`` is McNemar's, for 0/1 outcomes only."""

    left: str
    right: str
    quantity: str
    n: int
    difference: float
    low: float | None
    high: float | None
    p: float | None


def interval(differences: Sequence[float], seed: int, name: str) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of the mean (Efron 1979); (None, None) for fewer than two samples."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None, None
    if np.ptp(values) == 0:  # every resample is the same
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=500, rng=generator(seed, "bootstrap", 0, name)
    ).confidence_interval
    return float(found.low), float(found.high)


def mcnemar(left: Sequence[bool], right: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test (1947): do the discordant pairs fall evenly? 1 when there are none."""
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    discordant = only_left + only_right
    return float(binomtest(only_left, discordant, 0.5).pvalue) if discordant else 1.0


def compare(left: str, right: str, quantity: str, pairs: Sequence[tuple[float, float]], seed: int) -> Comparison:
    """Compare two paired series, named for the table."""
    differences = [a - b for a, b in pairs]
    low, high = interval(differences, seed, f"{left}-{right}-{quantity}")
    binary = all(value in (0, 1) for pair in pairs for value in pair)
    p = mcnemar([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs]) if binary else None
    return Comparison(left, right, quantity, len(pairs), float(np.mean(differences)), low, high, p)


def arm_comparisons(on: Sequence[Record], seed: int) -> list[dict[str, Any]]:
    """Select against base, random (mean over trials) and teacher: accuracy, and KL to the teacher."""
    if not on:
        return []

    def series(name: str) -> list[float]:
        return [float(np.mean(record[name])) for record in on]

    wanted = [("accuracy", "correct_select", "select", "correct_base", "base"),
              ("accuracy", "correct_select", "select", "correct_teacher", "teacher"),
              ("kl_to_teacher", "kl_select_teacher", "select", "kl_base_teacher", "base")]  # fmt: skip
    if on[0]["correct_random"]:
        wanted += [("accuracy", "correct_select", "select", "correct_random", "random"),
                   ("kl_to_teacher", "kl_select_teacher", "select", "kl_random_teacher", "random")]  # fmt: skip
    return [
        asdict(compare(left, right, quantity, list(zip(series(a), series(b), strict=True)), seed))
        for quantity, a, left, b, right in wanted
    ]
