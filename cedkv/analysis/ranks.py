"""Mean ranks of methods over columns of samples, with bootstrap intervals. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cedkv.analysis.paired import MAX_NUMBERS_IN_MEMORY, RESAMPLES
from cedkv.core.seeding import rng_for

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """What M methods came to on the samples of a column; all arrays are (samples, M).

    right: 1 where the method answers right, else 0. select, base: KL to the teacher of the method and of base, in nats.
    """

    right: Array
    select: Array
    base: Array


@dataclass(frozen=True)
class MeanRanks:
    """Ranks of M methods; 1 is the best.

    by_column: rank of each method in each column, (columns, M). low, high: ends of the 95 % interval of the mean over columns.
    behind: ends of the 95 % interval of the mean rank less that of the method with the lowest, (2, M).
    """

    by_column: Array
    low: Array
    high: Array
    behind: Array

    @property
    def mean(self) -> Array:
        """The mean over columns."""
        mean: Array = self.by_column.mean(axis=0)
        return mean


def mean_ranks(columns: Mapping[str, Outcomes], seed: int) -> MeanRanks:
    """Return the mean ranks with percentile bootstrap intervals over the samples of each column (Efron 1979).

    A resample draws samples with all their methods.

    Args:
        columns: name of a column, which fixes its resamples together with ``seed`` -> outcomes, of the same methods in all.
    """
    observed = np.stack([ranks(np.ones((1, len(o.right))), o)[0] for o in columns.values()])
    resampled = np.zeros((RESAMPLES, observed.shape[1]))
    for name, outcomes in columns.items():
        rng, n = rng_for(seed, "leaderboard", 0, name), len(outcomes.right)
        step = max(1, MAX_NUMBERS_IN_MEMORY // n)
        for start in range(0, RESAMPLES, step):
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(step, RESAMPLES - start))
            resampled[start : start + len(drawn)] += ranks(drawn.astype(float), outcomes)
    resampled /= len(columns)
    first = int(observed.mean(axis=0).argmin())
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return MeanRanks(observed, low, high, np.percentile(resampled - resampled[:, [first]], [2.5, 97.5], axis=0))


def ranks(drawn: Array, outcomes: Outcomes) -> Array:
    """Return the ranks of M methods in R resamples, (R, M).

    By accuracy; equal ones by ``relative_kl``; still equal ones share the mean of their ranks.

    Args:
        drawn: how often each sample is drawn, (R, samples).
    """
    select, base = _means(drawn, outcomes.select), _means(drawn, outcomes.base)
    kl = np.divide(select, base + 1e-6, out=np.full_like(select, np.inf), where=np.isfinite(select) & np.isfinite(base))
    kl = kl.round(9)  # smaller differences are rounding
    # counts of right answers are whole numbers: ranks by KL, below 1, decide between equal ones
    closeness: Array = rankdata(kl, axis=1) / (kl.shape[1] + 1)
    found: Array = rankdata(closeness - drawn @ outcomes.right, axis=1)
    return found


def _means(drawn: Array, values: Array) -> Array:
    """Return the mean of each resample; infinite for a method with a value that is not finite, whatever is drawn."""
    finite = np.isfinite(values).all(axis=0)
    means: Array = drawn @ np.where(finite, values, 0.0) / drawn.sum(axis=1, keepdims=True)
    means[:, ~finite] = np.inf
    return means
