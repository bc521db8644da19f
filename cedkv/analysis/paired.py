"""Paired comparisons over samples: bootstrap intervals, tests of no difference, and the number of samples needed. Pure.

Accuracy is tested by McNemar's exact test, everything else by a sign-flip test; intervals are percentile bootstraps over
samples. All of them take the random trials as given: an interval covers other samples, not other trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, norm

from cedkv.analysis.quantities import ACCURACY, GOLD_COVERAGE, KL_AMONG_LABELS, KL_TO_TEACHER
from cedkv.core.seeding import rng_for
from cedkv.core.values import Record
from cedkv.metrics_phase2 import spearman

RESAMPLES = 9999
MAX_NUMBERS_IN_MEMORY = 100_000
"""Numbers of bootstrap resamples held at the same time, so that memory does not grow with the number of samples."""
FLIPS = 99_999
"""Random sign flips per test: the smallest p is 1e-5, small enough to survive Holm's correction over some thousand rows."""
FLIPS_PER_BATCH = 4096


@dataclass(frozen=True)
class PairedDifference:
    """The mean paired difference ``left - right`` with its 95 % interval; ``p`` is McNemar's, for 0/1 outcomes only."""

    left: str
    right: str
    quantity: str
    n: int
    difference: float
    low: float | None
    high: float | None
    p: float | None


def interval(differences: Sequence[float], seed: int, name: str) -> tuple[float | None, float | None]:
    """Return the 95 % percentile bootstrap interval of the mean (Efron 1979).

    Args:
        differences: one value per sample.
        name: what the interval is of; together with ``seed`` it fixes the resamples.

    Returns:
        Low and high end; (None, None) for fewer than two samples, or when a value is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    if np.ptp(values) == 0:  # every resample is the same
        return float(values[0]), float(values[0])
    limits = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        batch=max(1, MAX_NUMBERS_IN_MEMORY // len(values)),
        rng=rng_for(seed, "bootstrap", 0, name),
    ).confidence_interval
    return float(limits.low), float(limits.high)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], seed: int, name: str
) -> tuple[float | None, float | None]:
    """Return the 95 % paired percentile bootstrap interval of ``relative_kl``, a ratio of means (Efron 1979).

    Args:
        numerators, denominators: one value of each per sample; a resample draws samples with both.
        name: as for ``interval``.

    Returns:
        Low and high end; (None, None) for fewer than two samples, or when a value is not finite.
    """
    values = np.asarray([numerators, denominators], dtype=float)
    if values.shape[1] < 2 or not np.isfinite(values).all():
        return None, None
    means = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        axis=-1,
        batch=max(1, MAX_NUMBERS_IN_MEMORY // values.shape[1]),
        rng=rng_for(seed, "bootstrap", 0, name),
    ).bootstrap_distribution
    low, high = np.percentile(means[0] / (means[1] + 1e-6), [2.5, 97.5])
    return float(low), float(high)


def share_interval(outcomes: Sequence[bool]) -> tuple[float | None, float | None]:
    """Return Wilson's 95 % interval of a share (1927), which has a width where all outcomes are the same, too.

    Returns:
        Low and high end; (None, None) without outcomes.
    """
    if not outcomes:
        return None, None
    limits = binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
    return float(limits.low), float(limits.high)


def mcnemar(left: Sequence[bool], right: Sequence[bool]) -> float:
    """Return the exact two-sided p of McNemar's test (1947): are the discordant pairs split evenly? 1 without such pairs.

    Raises:
        ValueError: the two series differ in length.
    """
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    discordant = only_left + only_right
    return float(binomtest(only_left, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(
    left: str, right: str, quantity: str, pairs: Sequence[tuple[float, float]], seed: int
) -> PairedDifference:
    """Return the mean difference of two paired series with its interval.

    Args:
        left, right, quantity: names of the two series and of what they measure; they also fix the interval's resamples.
        pairs: the values of left and right, one pair per sample.
    """
    differences = [a - b for a, b in pairs]
    low, high = interval(differences, seed, f"{left}-{right}-{quantity}")
    binary = quantity == ACCURACY.name and all(value in (0, 1) for pair in pairs for value in pair)
    p = mcnemar([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs]) if binary else None
    return PairedDifference(left, right, quantity, len(pairs), float(np.mean(differences)), low, high, p)


def arm_comparisons(on: Sequence[Record], seed: int) -> list[dict[str, Any]]:
    """Return the select arm compared with base, random (mean over trials) and teacher: accuracy, KL to the teacher, KL among
    labels where there are labels, and with random also gold coverage where there is one.
    """
    if not on:
        return []
    compared = [(ACCURACY, "base"), (ACCURACY, "teacher"), (KL_TO_TEACHER, "base"), (KL_AMONG_LABELS, "base")]
    if on[0]["correct_random"]:
        compared += [(quantity, "random") for quantity in (ACCURACY, KL_TO_TEACHER, KL_AMONG_LABELS, GOLD_COVERAGE)]
    rows = []
    for quantity, arm in compared:
        records = quantity.having(on)
        if not records:
            continue
        select, reference = ([float(np.mean(record[quantity.column(a)])) for record in records] for a in ("select", arm))
        pairs = list(zip(select, reference, strict=True))
        rows.append(asdict(paired_difference("select", arm, quantity.name, pairs, seed)))
    return rows


def sign_flip(rows: Sequence[Sequence[float]], seed: int) -> list[float]:
    """Return a two-sided p of no mean difference for each row of paired differences (Fisher's randomisation test, 1935).

    p is the share of random sign flips whose mean is at least as far from 0 as the observed one; it is exact where all
    flips can be listed. ``scipy.stats.permutation_test`` gives the same p for one row; here rows of one length share their
    flips, so that hundreds of comparisons take about a second.

    Args:
        rows: (comparisons, samples); all rows have the same length.

    Returns:
        One p per row, NaN for a row with a value that is not finite.
    """
    values = np.asarray(rows, dtype=float)
    if not values.size:
        return [1.0] * len(values)
    n = values.shape[1]
    exact = 2**n <= FLIPS + 1
    flips = 2**n if exact else FLIPS
    rng = rng_for(seed, "sign_flip", 0, str(n))
    observed = np.abs(values.sum(axis=1)) * (1 - 1e-9)  # mathematically identical sums, differing by rounding, count as equal
    extreme = np.zeros(len(values), dtype=np.int64)
    for start in range(0, flips, FLIPS_PER_BATCH):
        count = min(FLIPS_PER_BATCH, flips - start)
        if exact:
            bits = ((np.arange(start, start + count)[:, None] >> np.arange(n)) & 1).astype(np.uint8)
        else:
            packed = np.frombuffer(rng.bytes(-(-count * n // 8)), np.uint8)
            bits = np.unpackbits(packed, count=count * n).reshape(count, n)
        extreme += (np.abs((1.0 - 2.0 * bits) @ values.T) >= observed).sum(axis=0)
    p_values = extreme / flips if exact else (extreme + 1) / (flips + 1)
    finite = np.isfinite(values).all(axis=1)
    return [float(p) if is_finite else math.nan for p, is_finite in zip(p_values, finite, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction (1979).

    The k-th smallest of m p-values is multiplied by m - k + 1; the results never decrease and are at most 1. With 0.05 as
    the limit, the chance that any of the m verdicts is a false alarm is at most 5 %, whatever the dependence between tests.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return [float(value) for value in adjusted]


def n_needed(differences: Sequence[float], alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return the number of samples a single test needs to resolve a difference as large as the observed one:

        n = ((z_{1 - alpha/2} + z_{power}) * sd / |mean|)^2

    with the sd of the paired differences. This is the normal approximation, hence at least 2.

    Returns:
        None for fewer than two samples, without a difference, or when a value is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all() or np.mean(values) == 0:
        return None
    z = norm.ppf(1 - alpha / 2) + norm.ppf(power)
    return max(2, math.ceil((z * np.std(values, ddof=1) / abs(np.mean(values))) ** 2))


def gap_recovered(on: Sequence[Record], seed: int) -> dict[str, float | None]:
    """Return (acc_select - acc_base) / (acc_teacher - acc_base) with a paired bootstrap interval (Efron 1979).

    A resample draws samples together with all their arms. The few resamples (fewer than 1 in 40) whose denominator is not
    positive are left out.

    Returns:
        value, low, high and n (samples). Where the interval of the denominator reaches 0 or less, the ratio is undefined
        and value, low and high are None.
    """
    undefined: dict[str, float | None] = {"value": None, "low": None, "high": None, "n": len(on)}
    if len(on) < 2:
        return undefined
    base, select, teacher = (
        np.array([record[ACCURACY.column(arm)] for record in on], dtype=float) for arm in ("base", "select", "teacher")
    )
    gain, gap = select - base, teacher - base
    if not np.isfinite([gain, gap]).all():
        return undefined
    resampled_gain, resampled_gap = bootstrap(
        (np.stack([gain, gap]),),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        axis=-1,
        batch=max(1, MAX_NUMBERS_IN_MEMORY // len(on)),
        rng=rng_for(seed, "bootstrap", 0, "gap_recovered"),
    ).bootstrap_distribution
    if np.percentile(resampled_gap, 2.5) <= 0:
        return undefined
    positive = resampled_gap > 0
    low, high = np.percentile(resampled_gain[positive] / resampled_gap[positive], [2.5, 97.5])
    return undefined | {"value": float(gain.mean() / gap.mean()), "low": float(low), "high": float(high)}


def rank_agreement(on: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return Spearman's rank correlation (1904) between attention and causal drop of the candidate spans.

    Returns:
        per_sample: one correlation per sample, None where the sample has no candidates or one side is constant (constant
            values have no ranks).
        per_sample_mean, low, high: the mean of these correlations and its 95 % bootstrap interval.
        pooled: the correlation over the candidates of all samples, which also reflects differences between samples.
        n: samples with a correlation.
        candidates: candidate spans of all samples.
    """
    pairs = [(record.get("candidate_attention", []), record.get("candidate_causal_drop", [])) for record in on]
    per_sample = [spearman(attention, drop) for attention, drop in pairs]
    defined = [correlation for correlation in per_sample if correlation is not None]
    low, high = interval(defined, seed, "rank_agreement")
    all_attention, all_drops = ([value for pair in pairs for value in pair[side]] for side in (0, 1))
    return {
        "per_sample_mean": float(np.mean(defined)) if defined else None,
        "low": low,
        "high": high,
        "per_sample": per_sample,
        "pooled": spearman(all_attention, all_drops),
        "n": len(defined),
        "candidates": len(all_attention),
    }
