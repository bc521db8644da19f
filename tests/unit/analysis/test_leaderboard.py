"""Ranks of methods over tasks: against a hand computation, with what may and what may not be ranked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cedkv.analysis.leaderboard import Entry, Leaderboard, table
from cedkv.analysis.paired import gap_recovered, share_interval
from cedkv.analysis.ranking import leaderboard
from cedkv.analysis.ranks import Outcomes, mean_ranks, ranks
from cedkv.core.values import Record


def samples(right: Sequence[int], kl: float = 0.5, ids: Sequence[int] | None = None, teacher: int = 1) -> list[Record]:
    """Samples that a method answers right or wrong; base answers none, the teacher all."""
    return [
        {"sample_id": f"on-{i}", "correct_base": False, "correct_teacher": bool(teacher), "correct_select": bool(each),
         "kl_base_teacher": 2.0, "kl_select_teacher": kl}
        for i, each in zip(ids or range(len(right)), right, strict=True)
    ]  # fmt: skip


def entry(task: str, method: str, on: list[Record], **given: Any) -> Entry:
    values = {"model": "m", "reference": False, "query": "query-aware", "run_ids": ("r",), "off_p99": 0.1, "gain_min": 0.1}
    return Entry(task=task, method=method, on=on, **{**values, **given})


def ranked(board: Leaderboard) -> dict[str, float | None]:
    return {row.method: row.mean_rank for row in board.rows}


def test_ranks_are_by_accuracy_then_kl_and_equal_ones_share_them() -> None:
    right = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]], dtype=float)
    select = np.array([[0.4, 0.1, 0.1, 0.2, 0.2], [0.4, 0.1, 0.1, 0.2, 0.2]])
    base = np.ones_like(select)
    assert ranks(np.ones((1, 2)), Outcomes(right, select, base)).tolist() == [[3.0, 4.0, 5.0, 1.5, 1.5]]
    # drawn twice, the first sample makes the second method equal to the first in accuracy, and its KL is smaller
    assert ranks(np.array([[2.0, 0.0]]), Outcomes(right, select, base)).tolist() == [[4.0, 1.0, 5.0, 2.5, 2.5]]


def test_a_kl_that_is_not_finite_is_the_last_of_equal_ones_whatever_is_drawn() -> None:
    select = np.array([[math.inf, 5.0], [0.0, 5.0]])
    outcomes = Outcomes(np.ones((2, 2)), select, np.array([[math.inf, 1.0], [1.0, 1.0]]))
    assert ranks(np.array([[1.0, 1.0], [0.0, 2.0]]), outcomes).tolist() == [[2.0, 1.0]] * 2


def test_mean_rank_and_its_interval_against_all_resamples() -> None:
    """Two methods, two tasks of three samples: every one of the 27 x 27 resamples is listed, and its mean rank taken."""
    columns = {"a": ([1, 1, 0], [0, 1, 0]), "b": ([0, 0, 1], [1, 1, 0])}
    outcomes = {
        name: Outcomes(np.array(pair, dtype=float).T, np.full((3, 2), 0.5), np.ones((3, 2))) for name, pair in columns.items()
    }

    def first_of(pair: tuple[list[int], list[int]], drawn: Sequence[int]) -> float:
        left, right = (sum(method[i] for i in drawn) for method in pair)
        return 1.0 if left > right else 2.0 if left < right else 1.5

    draws = list(itertools.product(range(3), repeat=3))
    exact = [(first_of(columns["a"], i) + first_of(columns["b"], j)) / 2 for i in draws for j in draws]
    found = mean_ranks(outcomes, seed=7)
    assert found.by_column.tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert found.mean.tolist() == [1.5, 1.5]
    assert (found.low[0], found.high[0]) == tuple(np.percentile(exact, [2.5, 97.5]))
    assert found.behind[:, 0].tolist() == [0.0, 0.0]
    assert found.behind[:, 1].tolist() == pytest.approx(np.percentile([3 - 2 * x for x in exact], [2.5, 97.5]))


def test_resamples_are_paired() -> None:
    """A method that is right wherever another one is, and once more, is never behind: unpaired it often would be."""
    right = [i % 2 for i in range(40)]
    entries = [entry("a", "less", samples(right)), entry("a", "more", samples([1, *right[1:]], kl=0.4))]
    board = leaderboard(entries, 0)
    assert ranked(board) == {"more": 1.0, "less": 2.0}
    assert [(row.low, row.high) for row in board.rows] == [(1.0, 1.0), (2.0, 2.0)]
    assert board.rule.endswith("ahead of all others (95 % intervals of differences)")


def test_cells_have_the_statistics_of_the_reports() -> None:
    on = samples([1, 1, 0, 1, 0, 1], kl=0.5)
    board = leaderboard([entry("a", "x", on), entry("a", "y", samples([0] * 6))], 3)
    row = next(row for row in table(board) if row["method"] == "x")
    assert (row["accuracy"], row["n"], row["off_p99"]) == (pytest.approx(4 / 6), 6, 0.1)
    assert (row["accuracy_low"], row["accuracy_high"]) == share_interval([True, True, False, True, False, True])
    gap = gap_recovered(on, 3)
    assert (row["gap_recovered"], row["gap_recovered_low"], row["gap_recovered_high"]) == (
        gap["value"],
        gap["low"],
        gap["high"],
    )
    assert row["rel_kl"] == pytest.approx(0.25, rel=1e-5)
    assert (row["acc_base"], row["acc_teacher"], row["teacher_gains"]) == (0.0, 1.0, True)


def test_a_task_on_which_the_teacher_does_not_gain_does_not_count() -> None:
    entries = [
        entry("good", "x", samples([1, 1, 0])), entry("good", "y", samples([1, 0, 0])),
        entry("bad", "x", samples([0, 0, 0], teacher=0)), entry("bad", "y", samples([1, 1, 1], teacher=0)),
    ]  # fmt: skip
    board = leaderboard(entries, 0)
    assert ranked(board) == {"x": 1.0, "y": 2.0}
    assert [head.task for head in board.counted] == ["good"]
    assert board.columns["m", "bad"].left_out == "the teacher gains 0 on base (limit 0.1): nothing is decided about selection"
    nothing = leaderboard(entries[2:], 0)
    assert nothing.best is None
    assert nothing.rule == "no overall rank: on no task does the teacher gain on base, so nothing is decided about selection"


def test_a_method_that_misses_a_task_and_points_of_reference_are_listed_apart() -> None:
    entries = [
        entry(task, method, samples(right), reference=method == "oracle")
        for task in ("a", "b")
        for method, right in (("oracle", [1, 1, 1]), ("x", [1, 0, 0]), ("y", [1, 1, 0]))
    ]
    board = leaderboard([*entries, entry("a", "stray", samples([1, 1, 1]))], 0)
    assert list(ranked(board).items()) == [("y", 1.0), ("x", 2.0), ("stray", None), ("oracle", None)]
    assert board.rows[2].cells["m", "a"].rank is None
    assert leaderboard(entries[:2], 0).best is None, "one candidate is not ranked"


def test_methods_are_ranked_on_the_samples_that_most_of_them_have() -> None:
    """``more`` has other samples besides; ``other`` has none of them."""
    entries = [
        entry("a", "few", samples([1, 0], ids=[0, 1])),
        entry("a", "more", samples([0, 0, 1, 1, 1], ids=[0, 1, 2, 3, 4])),
        entry("a", "other", samples([1, 1], ids=[8, 9])),
    ]
    board = leaderboard(entries, 0)
    assert ranked(board) == {"few": 1.0, "more": 2.0, "other": None}
    assert board.columns["m", "a"].n == 2
    assert board.rows[1].cells["m", "a"].n == 5


def test_columns_of_a_model_stand_together() -> None:
    order = [("m1", "a"), ("m2", "a"), ("m1", "b"), ("m2", "b")]
    board = leaderboard([entry(task, "x", samples([1]), model=model) for model, task in order], 0)
    assert list(board.columns) == [("m1", "a"), ("m1", "b"), ("m2", "a"), ("m2", "b")]
