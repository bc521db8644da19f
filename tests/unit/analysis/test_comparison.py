"""The table of comparisons and identical conditions: recomputed with scipy, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm, permutation_test, spearmanr

from cedkv.analysis.comparison import (
    grid_comparisons,
    groups_differing_in,
    identical_conditions,
    unique_up_to_padding,
)
from cedkv.analysis.paired import FLIPS, gap_recovered, holm, n_needed, rank_agreement, sign_flip
from tests.support import making

RNG = np.random.default_rng(0)
ATTENTION = {"select.mode": "attention_diversity_span"}
DELIMITER = {"select.mode": "delimiter_span"}


def draw(mean: float, n: int, spread: float = 0.3) -> list[float]:
    return (mean + spread * RNG.standard_normal(n)).clip(1e-3).tolist()


def rows_of(
    *conditions: tuple[dict[str, str], dict[str, object]], n: int = 12
) -> dict[tuple[str, str, str], dict[str, object]]:
    found = grid_comparisons(making.grid(*conditions, n=n), 42)
    return {(row["left"], row["right"], row["quantity"]): row for row in found}


def plain_holm(p_values: list[float]) -> list[float]:
    """By its definition, over the sorted values."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    steps = [min(1.0, p_values[i] * (len(p_values) - k)) for k, i in enumerate(order)]
    return [max(steps[: order.index(i) + 1]) for i in range(len(p_values))]


def test_table_is_what_scipy_says() -> None:
    """Every row: difference, percentile bootstrap, exact McNemar or sign flips, Holm over all rows, samples needed."""
    n, kinds = 60, ("accuracy", "kl_to_teacher", "off_delta")
    right = {key: (RNG.random(n) < share).tolist() for key, share in (("a", 0.8), ("b", 0.5))}
    kl = {"a": draw(0.4, n), "b": draw(0.9, n)}
    off = {"a": draw(0.2, n), "b": draw(0.21, n)}
    rows = rows_of(
        (ATTENTION, {"correct": right["a"], "kl": kl["a"], "off": off["a"]}),
        (DELIMITER, {"correct": right["b"], "kl": kl["b"], "off": off["b"]}),
        n=n,
    )
    assert len(rows) == 2 * 4 + 3  # each against base and random by accuracy and KL; one against the other by three
    for kind, (left, other) in zip(kinds, ((right["b"], right["a"]), (kl["b"], kl["a"]), (off["b"], off["a"])), strict=True):
        row = rows["delimiter", "attention_diversity", kind]
        moved = np.array(left, float) - np.array(other, float)
        assert row["n"] == n
        assert row["difference"] == pytest.approx(moved.mean())
        outside = bootstrap((moved,), np.mean, method="percentile", rng=np.random.default_rng(7)).confidence_interval
        assert (row["low"], row["high"]) == pytest.approx((outside.low, outside.high), abs=0.12 * (outside.high - outside.low))
        if kind == "accuracy":
            won, lost = int((moved > 0).sum()), int((moved < 0).sum())
            assert row["p"] == pytest.approx(binomtest(won, won + lost).pvalue)
        else:
            test = permutation_test(
                (moved,), np.mean, permutation_type="samples", n_resamples=20000, rng=np.random.default_rng(8)
            )
            assert row["p"] == pytest.approx(test.pvalue, abs=0.02)  # two draws of 20,000: 0.005 at most, twice
        z = norm.ppf(0.975) + norm.ppf(0.8)
        assert row["n_needed"] == max(2, math.ceil((z * moved.std(ddof=1) / abs(moved.mean())) ** 2))
    tested = list(rows.values())
    assert [row["p_holm"] for row in tested] == pytest.approx(plain_holm([row["p"] for row in tested]))  # type: ignore[misc]
    assert rows["delimiter", "attention_diversity", "kl_to_teacher"]["verdict"] == "left higher"
    assert rows["delimiter", "attention_diversity", "off_delta"]["verdict"] == "not resolved"


def test_sign_flips_are_exact_where_they_can_be_listed() -> None:
    rows = [draw(0.1, 10), draw(0.0, 10, 1.0), [0.5] * 10]
    for row, p in zip(rows, sign_flip(rows, 1), strict=True):
        exact = permutation_test((row,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert p == pytest.approx(exact.pvalue)
    assert sign_flip([[0.0] * 40], 1) == [1.0]
    assert sign_flip([[1.0] * 40], 1)[0] == pytest.approx(1 / (FLIPS + 1))


def test_holm_never_falls_and_never_leaves_0_1() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005, 0.9, 0.04]
    assert holm(p_values) == pytest.approx(plain_holm(p_values))
    assert holm([]) == []


def test_samples_needed_at_the_edges() -> None:
    assert n_needed([1.0]) is n_needed([1.0, -1.0]) is n_needed([math.nan, 1.0]) is None
    assert n_needed([0.5, 0.5]) == 2


def test_with_too_few_samples_nothing_is_resolved() -> None:
    """Three samples of three, every one better: an interval without 0, and no winner all the same."""
    rows = rows_of((ATTENTION, {"kl": 0.1}), (DELIMITER, {"kl": 5.0, "correct": False}), n=3)
    row = rows["delimiter", "attention_diversity", "kl_to_teacher"]
    assert row["low"] == row["high"] == pytest.approx(4.9)
    assert {row["verdict"] for row in rows.values()} == {"not resolved"}


def test_a_difference_below_the_numerical_floor_is_none() -> None:
    """40 samples that all differ by 1e-9 give a tiny p; the floor of the plumbing records is 2e-7."""
    kl = draw(0.5, 40)
    rows = rows_of((ATTENTION, {"kl": kl}), (DELIMITER, {"kl": [v + 1e-9 for v in kl]}), n=40)
    row = rows["delimiter", "attention_diversity", "kl_to_teacher"]
    assert row["p_holm"] < 0.05  # type: ignore[operator]
    assert (row["verdict"], row["n_needed"]) == ("not resolved", None)


def test_a_value_that_is_not_finite_decides_nothing() -> None:
    rows = rows_of((ATTENTION, {}), (DELIMITER, {"kl": [math.nan] + [9.0] * 11}))
    row = rows["delimiter", "attention_diversity", "kl_to_teacher"]
    assert [row[name] for name in ("difference", "low", "high", "p", "p_holm", "n_needed")] == [None] * 6
    assert row["verdict"] == "not resolved"


def test_reference_points_are_compared_with_the_first_condition_only() -> None:
    rows = rows_of((ATTENTION, {}), ({"select.mode": "full_demo"}, {}), ({"select.mode": "random_span"}, {}))
    assert {right for left, right, _ in rows if left in ("full_demo", "random")} == {"attention_diversity"}
    assert {right for left, right, _ in rows if left == "attention_diversity"} == {"base", "its random spans"}


def test_kl_among_labels_is_compared_over_the_samples_that_have_labels() -> None:
    """Two of twelve samples have none: they are left out on both sides, and a grid without labels has no such rows."""
    labelled = making.grid((ATTENTION, {"label_kl": draw(0.2, 12)}), (DELIMITER, {"label_kl": draw(0.9, 12, 0.1)}))
    for condition in labelled:
        for record in condition.records.on[:2]:
            for name in [name for name in record if name.endswith("_labels")]:
                del record[name]
    rows = {(row["left"], row["right"]): row for row in grid_comparisons(labelled, 42) if row["quantity"] == "kl_among_labels"}
    assert set(rows) == {
        ("delimiter", "attention_diversity"), ("delimiter", "base"), ("delimiter", "its random spans"),
        ("attention_diversity", "base"), ("attention_diversity", "its random spans"),
    }  # fmt: skip
    assert {row["n"] for row in rows.values()} == {10}
    values = [[r["kl_select_teacher_labels"] for r in c.records.on[2:]] for c in labelled]
    row = rows["delimiter", "attention_diversity"]
    assert row["difference"] == pytest.approx(np.mean(values[1]) - np.mean(values[0]))
    assert row["verdict"] == "left higher"
    assert not [key for key in rows_of((ATTENTION, {}), (DELIMITER, {})) if key[2] == "kl_among_labels"]


SHRINK = {**ATTENTION, "prefix.padding_mode": "shrink_to_selected"}


def test_padding_is_one_condition_and_must_agree() -> None:
    """A difference of KLs beyond what rounding explains is a fault of the plumbing, and is said."""
    kl = draw(0.5, 12)
    results = making.grid((ATTENTION, {"kl": kl}), (SHRINK, {"kl": [v + 1e-6 for v in kl]}), (DELIMITER, {}))
    assert [c.label for c in unique_up_to_padding(results)] == ["attention_diversity", "delimiter"]
    (row,) = identical_conditions(results)
    assert row["verdict"] == "pass"
    assert row["largest"] == pytest.approx(1e-6)
    assert row["floor"] == pytest.approx(math.sqrt(2 * 2e-7)), "in the unit of the largest difference"
    (row,) = identical_conditions(making.grid((ATTENTION, {"kl": kl}), (SHRINK, {"kl": [*kl[:-1], kl[-1] + 0.1]})))
    assert (row["verdict"], row["largest"]) == ("fail", pytest.approx(0.1))
    (row,) = identical_conditions(making.grid((ATTENTION, {"kl": kl}), (SHRINK, {"kl": [*kl[:-1], math.nan]})))
    assert (row["verdict"], row["largest"]) == ("insufficient", None)


def test_the_whole_demonstration_must_be_the_teacher() -> None:
    full = {"select.mode": "full_demo"}
    found = identical_conditions(
        making.grid((full, {"kl": 1e-9}), ({**full, "injection.positioning_mode": "absolute"}, {"kl": 0.3}))
    )
    assert [(row["right"], row["verdict"]) for row in found] == [("teacher", "pass"), ("teacher", "fail")]


def test_families_agree_in_everything_else() -> None:
    results = making.grid(*[({"select.span_budget": str(b), "select.keep_sink": str(s)}, {}) for b in (1, 2) for s in (0, 4)])
    found = groups_differing_in(results, "select.span_budget")
    assert [[(c.config.select.span_budget, c.config.select.keep_sink) for c in group] for group in found] == [
        [(1, 0), (2, 0)], [(1, 4), (2, 4)]
    ]  # fmt: skip


def test_gap_recovered_with_its_interval() -> None:
    """Half of a gap of 1: the ratio of paired resamples. No gap, no ratio."""
    on = [making.on(correct_select=i % 2 == 0) for i in range(60)]
    found = gap_recovered(on, 42)
    assert found["value"] == pytest.approx(0.5)
    drawn = np.random.default_rng(3).choice([r["correct_select"] for r in on], (9999, 60)).mean(axis=1)
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.03)
    level = gap_recovered([making.on(correct_base=True) for _ in range(60)], 42)
    assert [level[name] for name in ("value", "low", "high")] == [None] * 3


def test_rank_agreement_is_spearmans() -> None:
    pairs = [(draw(1.0, 9), draw(1.0, 9)) for _ in range(7)]
    on = [making.on(candidate_attention=a, candidate_causal_drop=b) for a, b in pairs]
    found = rank_agreement([*on, making.on(), making.on(candidate_attention=[1, 1], candidate_causal_drop=[1, 2])])
    each = [spearmanr(a, b).statistic for a, b in pairs]
    assert found["per_sample"] == pytest.approx([*each, None, None])
    assert (found["n"], found["per_sample_mean"]) == (7, pytest.approx(np.mean(each)))
    left, right = ([value for pair in [*pairs, ([1, 1], [1, 2])] for value in pair[side]] for side in (0, 1))
    assert found["pooled"] == pytest.approx(spearmanr(left, right).statistic)
    assert found["candidates"] == len(left)
