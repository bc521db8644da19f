"""Paired comparisons over samples: bootstrap intervals, tests of no difference, and how many samples it would take. Pure.

Accuracy is tested by McNemar's exact test, everything else by flipping signs; intervals are percentile bootstraps over
samples. All of them take the random trials as they are: an interval says how other samples would come out, not other trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, norm, spearmanr

from cedkv.core.seeding import rng_for
from cedkv.core.values import Record

RESAMPLES = 9999
AT_ONCE = 100_000
"""Numbers of resamples or sign flips held at once, so that memory does not grow with the number of samples."""
FLIPS = 99_999
"""Sign flips of a test: its smallest p is 1e-5, small enough to survive Holm's correction over some thousand comparisons."""


@dataclass(frozen=True)
class PairedDifference:
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
    """95 % percentile bootstrap interval of the mean (Efron 1979); (None, None) for fewer than two samples, and for such as
    are not finite.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    if np.ptp(values) == 0:  # every resample is the same
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=max(1, AT_ONCE // len(values)),
        rng=rng_for(seed, "bootstrap", 0, name),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def mcnemar(left: Sequence[bool], right: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test (1947): do the discordant pairs fall evenly? 1 when there are none."""
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    discordant = only_left + only_right
    return float(binomtest(only_left, discordant, 0.5).pvalue) if discordant else 1.0


def compare(left: str, right: str, quantity: str, pairs: Sequence[tuple[float, float]], seed: int) -> PairedDifference:
    """Compare two paired series, named for the table."""
    differences = [a - b for a, b in pairs]
    low, high = interval(differences, seed, f"{left}-{right}-{quantity}")
    binary = quantity == "accuracy" and all(value in (0, 1) for pair in pairs for value in pair)
    p = mcnemar([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs]) if binary else None
    return PairedDifference(left, right, quantity, len(pairs), float(np.mean(differences)), low, high, p)


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


def sign_flip(rows: Sequence[Sequence[float]], seed: int) -> list[float]:
    """Two-sided p of no mean difference, for each row of paired differences: were signs flipped at random, how often would
    a mean this far from 0 come out (Fisher's randomisation test, 1935)? Exact where all flips can be listed. NaN for a row in
    which something is not finite.

    ``scipy.stats.permutation_test`` gives the same p one row at a time; here rows of one length share their flips, which
    makes hundreds of comparisons a matter of a second.
    """
    values = np.asarray(rows, dtype=float)
    if not values.size:
        return [1.0] * len(values)
    n = values.shape[1]
    exact = 2**n <= FLIPS + 1
    flips = 2**n if exact else FLIPS
    rng = rng_for(seed, "sign_flip", 0, str(n))
    reached = np.abs(values.sum(axis=1)) * (1 - 1e-9)  # sums that are equal on paper count as reached
    beyond = np.zeros(len(values), dtype=np.int64)
    for at in range(0, flips, 4096):
        some = min(4096, flips - at)
        if exact:
            bits = ((np.arange(at, at + some)[:, None] >> np.arange(n)) & 1).astype(np.uint8)
        else:
            bits = np.unpackbits(np.frombuffer(rng.bytes(-(-some * n // 8)), np.uint8), count=some * n).reshape(some, n)
        beyond += (np.abs((1.0 - 2.0 * bits) @ values.T) >= reached).sum(axis=0)
    found = beyond / flips if exact else (beyond + 1) / (flips + 1)
    return [float(p) if known else math.nan for p, known in zip(found, np.isfinite(values).all(axis=1), strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the k-th smallest of m p-values times m - k + 1, never falling, 1 at most.

    With 0.05 as the limit, the chance that any of the m verdicts is a false alarm is 5 % at most, however they depend on
    each other.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return [float(value) for value in adjusted]


def n_needed(differences: Sequence[float], alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Samples it takes to resolve a difference as large as the one seen, in a single test:

        n = ((z_{1 - alpha/2} + z_{power}) * sd / |mean|)^2

    sd of the paired differences; the normal approximation, so at least 2. None without a difference, or of fewer than two.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all() or np.mean(values) == 0:
        return None
    z = norm.ppf(1 - alpha / 2) + norm.ppf(power)
    return max(2, math.ceil((z * np.std(values, ddof=1) / abs(np.mean(values))) ** 2))


def gap_recovered(on: Sequence[Record], seed: int) -> dict[str, float | None]:
    """(acc_select - acc_base) / (acc_teacher - acc_base) with a paired bootstrap interval: samples are drawn with all arms.

    Rule: where the interval of the denominator reaches 0 or less the ratio is undefined, and all of value, low and high
    are None. Otherwise the few resamples (fewer than 1 in 40) whose denominator is not positive are left out.
    """
    found: dict[str, float | None] = {"value": None, "low": None, "high": None, "n": len(on)}
    if len(on) < 2:
        return found
    base = np.array([record["correct_base"] for record in on], dtype=float)
    gain = np.array([record["correct_select"] for record in on], dtype=float) - base
    gap = np.array([record["correct_teacher"] for record in on], dtype=float) - base
    if not np.isfinite([gain, gap]).all():
        return found
    drawn = bootstrap(
        (np.stack([gain, gap]),), np.mean, n_resamples=RESAMPLES, method="percentile", axis=-1,
        batch=max(1, AT_ONCE // len(on)), rng=rng_for(seed, "bootstrap", 0, "gap_recovered"),
    ).bootstrap_distribution  # fmt: skip
    if np.percentile(drawn[1], 2.5) <= 0:
        return found
    defined = drawn[:, drawn[1] > 0]
    low, high = np.percentile(defined[0] / defined[1], [2.5, 97.5])
    return found | {"value": float(gain.mean() / gap.mean()), "low": float(low), "high": float(high)}


def rank_agreement(on: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Spearman's rank correlation between attention and causal drop of the candidate spans.

    Returns:
        per_sample: one correlation a sample, None where it has no candidates or one side is constant (a constant has no
            ranks); per_sample_mean with low and high: their mean and its interval; pooled: all candidates of all samples
            in one, which also counts differences between samples; n: samples with a correlation; candidates: spans in all.
    """

    def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
        return float(spearmanr(left, right).statistic) if len(set(left)) > 1 and len(set(right)) > 1 else None

    pairs = [(record.get("candidate_attention", []), record.get("candidate_causal_drop", [])) for record in on]
    per_sample = [spearman(left, right) for left, right in pairs]
    known = [value for value in per_sample if value is not None]
    low, high = interval(known, seed, "rank_agreement")
    attention, drop = ([value for pair in pairs for value in pair[side]] for side in (0, 1))
    return {
        "per_sample_mean": float(np.mean(known)) if known else None,
        "low": low,
        "high": high,
        "per_sample": per_sample,
        "pooled": spearman(attention, drop),
        "n": len(known),
        "candidates": len(attention),
    }
