"""Paired statistics: McNemar's test against its formula, intervals against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from cedkv.analysis import paired
from cedkv.analysis.paired import arm_comparisons, interval, mcnemar, paired_difference, ratio_interval, share_interval
from tests.support import making


def outcomes(both: int, only_left: int, only_right: int, neither: int) -> tuple[list[bool], list[bool]]:
    left = [True] * both + [True] * only_left + [False] * only_right + [False] * neither
    right = [True] * both + [False] * only_left + [True] * only_right + [False] * neither
    return left, right


def test_mcnemar_by_hand() -> None:
    """One against five: 2 x (C(6,0) + C(6,1)) / 2^6."""
    assert mcnemar(*outcomes(10, 1, 5, 7)) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(*outcomes(0, 0, 6, 0)) == pytest.approx(2 / 64)
    assert mcnemar(*outcomes(3, 4, 4, 3)) == 1.0


def test_mcnemar_without_discordant_pairs() -> None:
    assert mcnemar(*outcomes(5, 0, 0, 5)) == mcnemar([], []) == 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(both=st.integers(0, 5), left=st.integers(0, 25), right=st.integers(0, 25), neither=st.integers(0, 5))
def test_mcnemar_is_the_exact_two_sided_test(both: int, left: int, right: int, neither: int) -> None:
    """Concordant pairs say nothing, and neither arm is favoured."""
    found = mcnemar(*outcomes(both, left, right, neither))
    expected = min(1.0, 2 * binom.cdf(min(left, right), left + right, 0.5)) if left + right else 1.0
    assert found == pytest.approx(expected)
    assert found == mcnemar(*outcomes(0, left, right, 0)) == mcnemar(*outcomes(0, right, left, 0))


def test_series_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])


def test_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 400).tolist()
    low, high = interval(values, 42, "x")
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.02)


def test_interval_covers_the_mean_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """95 % over 200 sets of 60; a percentile bootstrap falls a little short. One-sided or 68 % intervals would show."""
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    rng = np.random.default_rng(1)
    found = [interval(rng.normal(0.5, 1.0, 60).tolist(), 42, str(k)) for k in range(200)]
    below, above = (sum(test) for test in zip(*((high < 0.5, low > 0.5) for low, high in found), strict=True))  # type: ignore[operator]
    assert 2 <= below + above <= 22
    assert max(below, above) <= 14


def test_interval_of_constant_or_too_few_values() -> None:
    """Constant differences are common (an arm that is always right); of a single one a resample says nothing."""
    assert interval([0.25] * 9, 42, "x") == (0.25, 0.25)
    assert interval([0.0, 0.0], 42, "x") == (0.0, 0.0)
    assert interval([0.25], 42, "x") == interval([], 42, "x") == (None, None)


def test_interval_is_drawn_from_seed_and_name() -> None:
    values = [0.0, 1.0, 0.5, 3.0, -1.0, 0.2]
    assert interval(values, 42, "x") == interval(values, 42, "x")
    draws = {interval(list(np.linspace(0, 1, 37) ** 2), seed, name) for seed, name in ((42, "x"), (43, "x"), (42, "y"))}
    assert len(draws) == 3


def test_compare_by_hand() -> None:
    found = paired_difference("select", "base", "accuracy", [(1, 0), (1, 0), (1, 1), (0, 1)], 42)
    assert (found.n, found.difference) == (4, 0.25)
    assert found.p == pytest.approx(1.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= 0.25 <= found.high


def test_only_outcomes_have_mcnemars_p() -> None:
    assert paired_difference("select", "base", "kl", [(0.5, 1.0), (0.25, 1.0)], 42).p is None
    assert paired_difference("select", "random", "accuracy", [(1, 0.5), (1, 0.0)], 42).p is None


def test_interval_of_a_ratio_of_means_draws_pairs() -> None:
    """Numerator and denominator move together here, so that their ratio hardly does; drawn apart it would spread."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 1.0, 60)
    select = 0.5 * base + rng.normal(0, 0.01, 60)
    low, high = ratio_interval(select.tolist(), base.tolist(), 42, "x")
    drawn = np.random.default_rng(7).integers(60, size=(9999, 60))
    outside = np.percentile(select[drawn].mean(axis=1) / base[drawn].mean(axis=1), [2.5, 97.5])
    assert (low, high) == pytest.approx(outside, abs=3e-4)
    assert ratio_interval([1.0], [2.0], 42, "x") == ratio_interval([math.nan, 1.0], [1.0, 2.0], 42, "x") == (None, None)


@pytest.mark.parametrize(("right", "n"), [(0, 8), (8, 8), (3, 10)])
def test_interval_of_a_share_is_wilsons(right: int, n: int) -> None:
    """His formula of 1927, written out; it has a width where all outcomes are the same."""
    z, p = 1.959964, right / n
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n)]
    found = share_interval([i < right for i in range(n)])
    assert found == pytest.approx(expected, abs=1e-6)
    assert share_interval([]) == (None, None)


def test_arms_that_are_compared() -> None:
    on = [making.on(sample_id=f"on-{k}", correct_select=k < 3, kl_select_teacher=0.5 + k) for k in range(4)]
    found = {(row["quantity"], row["right"]): row for row in arm_comparisons(on, 42)}
    assert set(found) == {
        ("accuracy", "base"), ("accuracy", "teacher"), ("accuracy", "random"), ("kl_to_teacher", "base"),
        ("kl_to_teacher", "random"),
    }  # fmt: skip
    assert {row["left"] for row in found.values()} == {"select"}
    assert found["accuracy", "base"]["difference"] == 0.75
    assert found["accuracy", "teacher"]["difference"] == -0.25
    assert found["accuracy", "random"]["difference"] == 0.25
    assert found["kl_to_teacher", "base"]["difference"] == 0.0
    assert found["kl_to_teacher", "random"]["difference"] == 0.75
    assert found["accuracy", "base"]["p"] == pytest.approx(0.25)
    assert found["accuracy", "random"]["p"] is None
    assert arm_comparisons(on, 42) == arm_comparisons(on, 42)


def test_arms_are_compared_among_labels_over_the_samples_that_have_labels() -> None:
    on = [making.on(**making.among_labels(kl)) for kl in (0.1, 0.5, None)]
    found = {row["right"]: row for row in arm_comparisons(on, 42) if row["quantity"] == "kl_among_labels"}
    assert set(found) == {"base", "random"}
    assert {row["n"] for row in found.values()} == {2}
    assert found["base"]["difference"] == pytest.approx(0.3 - 1.0)
    assert found["random"]["difference"] == pytest.approx(0.3 - 0.6)


def test_no_random_arm_no_comparison_with_it() -> None:
    on = [making.on(correct_random=[], kl_random_teacher=[]) for _ in range(3)]
    assert {row["right"] for row in arm_comparisons(on, 42)} == {"base", "teacher"}
    assert arm_comparisons([], 42) == []
