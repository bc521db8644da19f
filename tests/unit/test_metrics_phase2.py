"""Figures of a run from its records: by hand, and None where there is nothing to say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from cedkv.core.files import finite_or_none
from cedkv.metrics_phase2 import difference, largest, mean, median, p99, repro_accuracies, run_metrics, share_above, upper_bound
from tests.support import making


def test_nothing_is_none() -> None:
    """0 would be a figure, and NaN would be compared."""
    assert mean([]) is None
    assert p99([]) is None
    assert difference(None, 1.0) is difference(1.0, None) is None
    assert largest([], "null_effect") is None
    assert repro_accuracies([], []) == []
    assert set(run_metrics([], []).values()) == {None}


def test_p99_is_an_observed_value_never_a_smaller_one() -> None:
    """With interpolation one harmful prompt among 64 would pass as 0.63 of itself."""
    assert p99([0.0] * 63 + [1.0]) == 1.0
    assert p99([float(k) for k in range(101)]) == 99.0
    assert p99([float(k) for k in range(100)]) == 99.0
    assert p99([3.0]) == 3.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=300), order=st.randoms(use_true_random=False))
def test_p99_leaves_at_most_one_percent_above(values: list[float], order: object) -> None:
    found = p99(values)
    assert found in values
    assert sum(value > found for value in values) <= 0.01 * len(values)
    order.shuffle(values)  # type: ignore[attr-defined]
    assert p99(values) == found


def test_accuracies_and_gain_by_hand() -> None:
    on = [making.on(correct_base=k < 1, correct_teacher=k < 5, correct_select=k < 4) for k in range(8)]
    metrics = run_metrics(on, [])
    assert metrics["phase2_on_acc_base"] == 1 / 8
    assert metrics["phase2_on_acc_teacher"] == 5 / 8
    assert metrics["phase2_on_acc_student_select"] == 4 / 8
    assert metrics["phase2_on_gain_select"] == 3 / 8
    assert metrics["phase2_on_gain_teacher"] == 4 / 8
    assert metrics["phase2_gap_recovered"] == 3 / 4


def test_among_labels_over_the_samples_that_have_labels() -> None:
    on = [making.on(**making.among_labels(0.2)), making.on(**making.among_labels(0.6)), making.on()]
    on[1] |= {"correct_select_labels": False, "kl_base_teacher_labels": 3.0}
    metrics = run_metrics(on, [])
    assert metrics["phase2_kl_select_teacher_labels_mean"] == pytest.approx(0.4)
    assert metrics["phase2_rel_kl_labels_select"] == pytest.approx(0.4 / 2.000001)
    arms = ("base", "teacher", "student_select")
    assert [metrics[f"phase2_on_acc_labels_{arm}"] for arm in arms] == [0.0, 1.0, 0.5]
    assert metrics["phase2_on_acc_labels_student_random_mean"] == 0.5
    assert metrics["phase2_kl_base_teacher_labels_mean"] == 2.0
    assert metrics["phase2_kl_random_teacher_labels_mean"] == pytest.approx(0.6)
    assert metrics["phase2_rel_kl_labels_random"] == pytest.approx(0.6 / 2.000001)
    assert {value for name, value in run_metrics(on[2:], []).items() if "labels" in name} == {None}


@pytest.mark.parametrize(("base", "teacher"), [(True, True), (True, False), (False, False)])
def test_no_gap_nothing_recovered(base: bool, teacher: bool) -> None:
    """A teacher that is no better than base leaves no gap; a ratio over 0 or less would mislead."""
    assert run_metrics([making.on(correct_base=base, correct_teacher=teacher)], [])["phase2_gap_recovered"] is None


def test_means_over_on_samples() -> None:
    on = [
        making.on(phase2_delta_on_select=0.5, kl_base_teacher=1.0),
        making.on(phase2_delta_on_select=1.5, kl_base_teacher=4.0),
    ]
    metrics = run_metrics(on, [])
    assert metrics["phase2_delta_on_mean_select"] == 1.0
    assert metrics["phase2_kl_base_teacher_mean"] == 2.5
    assert metrics["phase2_kl_select_teacher_mean"] == 0.5


def test_figures_over_off_prompts() -> None:
    off = [making.off(phase2_delta_off_select=0.1 * k, same_token=k != 3) for k in range(4)]
    metrics = run_metrics([], off)
    assert metrics["phase2_off_delta_mean_select"] == pytest.approx(0.15)
    assert metrics["phase2_off_delta_p99_select"] == pytest.approx(0.3)
    assert metrics["phase2_off_same_token_share"] == 0.75
    assert metrics["phase2_on_acc_base"] is None


def test_share_of_off_prompts_beyond_the_limit_has_an_upper_bound() -> None:
    """By hand: none of n leaves 5 % for shares up to 1 - 0.05^(1/n); a prompt at the limit is not beyond it."""
    for n, bound in ((128, 0.0231), (299, 0.00997), (1, 0.95)):
        metrics = run_metrics([], [making.off(phase2_delta_off_select=1.0)] * n, 1.0)
        assert metrics["phase2_off_over_limit_share"] == 0.0
        assert metrics["phase2_off_over_limit_upper"] == pytest.approx(1 - 0.05 ** (1 / n))
        assert metrics["phase2_off_over_limit_upper"] == pytest.approx(bound, rel=3e-3)
    off = [making.off(phase2_delta_off_select=delta) for delta in (0.5, 1.5, 0.1, 0.2)]
    metrics = run_metrics([], off, 1.0)
    assert metrics["phase2_off_over_limit_share"] == 0.25
    bound = metrics["phase2_off_over_limit_upper"] or 0.0
    assert binom.cdf(1, 4, bound) == pytest.approx(0.05), "the share under which one or none of four is seen in 5 % of runs"
    assert run_metrics([], [off[1]] * 4, 1.0)["phase2_off_over_limit_upper"] == 1.0
    assert run_metrics([], off)["phase2_off_over_limit_share"] is None


def test_a_delta_that_is_not_finite_is_not_counted_as_within_the_limit() -> None:
    metrics = run_metrics([], [making.off(), making.off(phase2_delta_off_select=math.nan)], 1.0)
    for name in ("share", "upper"):
        assert math.isnan(metrics[f"phase2_off_over_limit_{name}"] or 0.0)
    assert share_above([], 1.0) is upper_bound(None, 0) is median([]) is None
    assert math.isnan(median([1.0, math.inf, 2.0]) or 0.0)


def test_further_positions_are_counted_over_all_prompts_that_have_some() -> None:
    off = [
        making.off(**making.further(0.1, 0.3, changed=[1])),
        making.off(**making.further(0.8, entropy=3.0)),
        making.off(**making.further(entropy=5.0)),
        making.off(),
    ]
    metrics = run_metrics([], off)
    assert metrics["phase2_off_further_kl_mean"] == pytest.approx(0.4)
    assert metrics["phase2_off_further_kl_p99"] == 0.8
    assert metrics["phase2_off_further_changed_share"] == pytest.approx(1 / 3)
    assert metrics["phase2_off_base_entropy_median"] == 3.0
    older = run_metrics([], off[3:])
    assert {value for name, value in older.items() if "further" in name or "entropy" in name} == {None}
    assert math.isnan(run_metrics([], [making.off(**making.further(math.nan))])["phase2_off_further_kl_p99"] or 0.0)


def test_rank_agreement_is_the_mean_over_samples_that_have_ranks() -> None:
    """Constant scores have no ranks: they are left out, and do not turn the figure into NaN."""
    on = [
        making.on(candidate_attention=[0.1, 0.2, 0.3], candidate_causal_drop=[1.0, 2.0, 9.0]),
        making.on(candidate_attention=[0.1, 0.2, 0.3], candidate_causal_drop=[1.0, 3.0, 2.0]),
        making.on(candidate_attention=[0.1, 0.2, 0.3], candidate_causal_drop=[0.0, 0.0, 0.0]),
        making.on(),
    ]
    assert run_metrics(on, [])["phase2_attention_causal_drop_spearman"] == pytest.approx((1 + 0.5) / 2)
    assert run_metrics(on[2:], [])["phase2_attention_causal_drop_spearman"] is None


def test_largest_takes_what_has_the_check_and_keeps_nan() -> None:
    """``max`` of a list that begins with a number skips a NaN behind it: a broken sample would go unseen."""
    assert largest([{"a": 1.0}, {"b": 9.0}, {"a": 2.0}], "a") == 2.0
    assert largest([{"b": 9.0}], "a") is None
    assert math.isnan(largest([{"a": 1.0}, {"a": math.nan}], "a") or 0.0)


def test_repeated_accuracies() -> None:
    on = [making.on(), making.on(correct_select=False)]
    assert repro_accuracies(on, making.repeats(on, runs=3)) == [0.5, 0.5, 0.5]
    assert repro_accuracies(on, making.repeats(on, runs=3, wrong=1)) == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_json_has_not(value: float) -> None:
    assert finite_or_none(value) is None


@pytest.mark.parametrize("value", [0, 0.0, -1.5, True, "nan", None, 10**400])
def test_what_json_has(value: object) -> None:
    assert finite_or_none(value) is value
