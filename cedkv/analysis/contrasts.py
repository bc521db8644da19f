"""Two conditions, or two arms, by one quantity: the difference with its interval, its sign, and both in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cedkv.analysis.comparison import (
    comparison_row,
    series,
)
from cedkv.analysis.paired import interval
from cedkv.analysis.quantities import Quantity
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import number


@dataclass(frozen=True)
class Contrast:
    """The difference ``left - right`` in words, with its interval; the ends are None for too few samples."""

    text: str
    """Both means and the change."""
    change: str
    """The difference with its interval: ``−1.2 [−1.3, −1.1]``."""
    low: float | None
    high: float | None

    @property
    def sign(self) -> int | None:
        """1 above 0, -1 below 0, None where the interval holds 0 or is missing."""
        return sign_of(self.low, self.high)


def sign_of(low: float | None, high: float | None) -> int | None:
    """Return the sign of a difference by its interval: 1, -1, or None where the interval holds 0 or is missing."""
    if low is None or high is None:
        return None
    return 1 if low > 0 else -1 if high < 0 else None


def contrast(left: ConditionResult, right: ConditionResult, quantity: Quantity, arm: str = "select") -> Contrast:
    """Return ``left - right`` of a quantity in words, with the interval that the table of comparisons shows.

    Args:
        arm: the arm of the right condition; the left one is always ``select``.
    """
    left_values, right_values = series(left, quantity), series(right, quantity, arm)
    left_name, right_name = (left.label, right.label) if arm == "select" else ("select", arm)
    row = comparison_row(left_values, right_values, left=left_name, right=right_name, quantity=quantity, seed=left.config.seed)
    low, high = row["low"], row["high"]
    if low is None or high is None:
        return Contrast("too few samples to compare", "too few samples to compare", None, None)
    means = f"{short(float(np.mean(left_values)))} against {short(float(np.mean(right_values)))}"
    change = signed_interval(row["difference"], low, high)
    return Contrast(f"{means}, difference {change}", change, low, high)


def mean_and_interval(condition: ConditionResult, quantity: Quantity) -> tuple[float, float | None, float | None]:
    """Return a condition's mean and the ends of its interval; NaN without values, None where there are too few."""
    select = series(condition, quantity)
    low, high = interval(select, condition.config.seed, f"{condition.label}-{quantity.name}")
    return (float(np.mean(select)) if select else math.nan), low, high


def mean_with_interval(condition: ConditionResult, quantity: Quantity) -> str:
    """Return a condition's mean with its interval: ``0.188 [0.09, 0.28]``."""
    mean, low, high = mean_and_interval(condition, quantity)
    return short(mean) + ("" if low is None or high is None else f" [{short(low)}, {short(high)}]")


def short(value: float | None) -> str:
    """Return three significant digits, or a dash."""
    return number(value, 3)


def signed(value: float) -> str:
    """Return three significant digits with a sign."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def signed_interval(mean: float, low: float, high: float) -> str:
    """Return a difference with its interval: ``−1.2 [−1.3, −1.1]``."""
    return f"{signed(mean)} [{signed(low)}, {signed(high)}]"


def verdict_of(sign: int | None, quantity: Quantity) -> str:
    undecided = f"no resolved difference in {quantity.short_label}"
    return {1: quantity.when_higher, -1: quantity.when_lower, None: undecided}[sign]
