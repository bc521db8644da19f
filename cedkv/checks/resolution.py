"""What a number of samples can resolve: below it a check that passes has decided nothing. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cedkv.core.text import number
from cedkv.metrics_phase2 import upper_bound

P_VALUE = 0.05
LEAST_DIFFERING = 6
"""Samples that only one of two arms answers, at least, for p < ``P_VALUE`` by McNemar's exact test: 2 x 0.5 ** 6 = 0.031."""


def accuracy_resolution(n: int) -> str:
    """Return which differences of accuracy between two arms n paired samples resolve."""
    test = f"McNemar's exact test, p < {P_VALUE}"
    if n < LEAST_DIFFERING:
        return f"{n} samples resolve no difference of accuracy: it takes {LEAST_DIFFERING} ({test})"
    return f"{n} samples resolve differences of accuracy from {number(LEAST_DIFFERING / n)} on ({test})"


def tail_resolution(n: int, share: float = 0.01) -> str:
    """Return what n OFF prompts, of which none is beyond the limit, say about the share of all prompts that are."""
    if not n:
        return "no OFF prompt"
    enough = math.ceil(math.log(P_VALUE) / math.log1p(-share))
    bound = number(upper_bound(0.0, n))
    return f"{n} with none beyond the limit would bound the share of all prompts at {bound} (95 %); {share} takes {enough}"


def mean_resolution(statistic: Callable[..., float], *values: Sequence[float]) -> str:
    """Return the half-width of the 95 % interval of a statistic of means, by the jackknife (Tukey 1958) and Student's t.

    Args:
        statistic: of one array per sequence of values.
        values: one number per sample each.
    """
    columns: list[NDArray[np.float64]] = [np.asarray(column, dtype=float) for column in values]
    n = len(columns[0])
    if n < 2 or not all(np.isfinite(column).all() for column in columns):
        return f"n = {n} has no interval"
    from scipy.stats import t

    without = np.array([statistic(*(np.delete(column, i) for column in columns)) for i in range(n)])
    error = math.sqrt((n - 1) * without.var())
    return f"{n} samples give it to ± {number(float(t.ppf(1 - P_VALUE / 2, n - 1)) * error)} (95 %, jackknife)"
