"""Gold coverage, LDS and comprehensiveness in metrics and paired comparisons: over the samples that have them."""

from __future__ import annotations

import numpy as np
import pytest

from cedkv.analysis.comparison import grid_comparisons, paired_series
from cedkv.analysis.paired import arm_comparisons, interval
from cedkv.analysis.quantities import COMPREHENSIVENESS, GOLD_COVERAGE, JUDGED, LDS
from cedkv.analysis.results import ConditionResult, collect
from cedkv.metrics_phase2 import run_metrics, spearman
from cedkv.report.tables import OnTable, conditions_table
from tests.support import making

COLUMNS = ("gold_coverage", "lds", "comprehensiveness")


@pytest.fixture
def results() -> list[ConditionResult]:
    """Twelve samples; the second condition lacks an LDS in two, the third has none of the numbers."""
    found = making.grid(*[({"select.mode": mode}, {}) for mode in ("attention_diversity_span", "delimiter_span", "wrong_demo")])
    for c, better in zip(found[:2], (0.0, 0.25), strict=True):
        for i, record in enumerate(c.records.on):
            record |= {"gold_coverage": 0.5 + better, "lds": 0.01 * i + better, "comprehensiveness": 1.0 + 0.1 * i - better}
            record["gold_coverage_random"] = [0.0, 0.125 * (i % 2)]
    for i in (0, 5):
        del found[1].records.on[i]["lds"]
    return found


def test_metrics_are_means_over_the_samples_that_have_them(results: list[ConditionResult]) -> None:
    metrics = run_metrics(results[1].records.on, [])
    assert metrics["phase2_gold_coverage_mean"] == 0.75
    assert metrics["phase2_gold_coverage_random_mean"] == pytest.approx(0.125 / 4)
    assert metrics["phase2_lds_mean"] == pytest.approx(np.mean([0.01 * i for i in range(12) if i not in (0, 5)]) + 0.25)
    assert metrics["phase2_comprehensiveness_mean"] == pytest.approx(1.0 + 0.55 - 0.25)
    none = run_metrics(results[2].records.on, [])
    assert [none[f"phase2_{column}_mean"] for column in (*COLUMNS, "gold_coverage_random")] == [None] * 4


def test_pairs_are_the_samples_in_which_both_sides_have_it(results: list[ConditionResult]) -> None:
    rows = {(row["left"], row["quantity"]): row for row in grid_comparisons(results, 42) if row["right"] == results[0].label}
    assert {quantity for left, quantity in rows if left == "delimiter"} >= set(COLUMNS)
    assert not {quantity for left, quantity in rows if left == "wrong_demo"} & set(COLUMNS)
    assert {column: rows["delimiter", column]["n"] for column in COLUMNS} == {
        "gold_coverage": 12, "lds": 10, "comprehensiveness": 12
    }  # fmt: skip
    row = rows["delimiter", "lds"]
    assert row["difference"] == pytest.approx(0.25)
    assert row["verdict"] == "left higher"
    left, right = paired_series(results[1], results[0], LDS)
    assert left == pytest.approx([value + 0.25 for value in right])
    assert right == pytest.approx([0.01 * i for i in range(12) if i not in (0, 5)])
    assert rows["delimiter", "comprehensiveness"]["difference"] == pytest.approx(-0.25)


def test_only_coverage_is_compared_with_random_spans(results: list[ConditionResult]) -> None:
    """The random arm has a coverage per trial; LDS is of scores, which it has not. Nothing is compared with base."""
    rows = [row for row in grid_comparisons(results, 42) if row["right"] in ("base", "its random spans")]
    judged = {(row["left"], row["right"], row["quantity"]) for row in rows if row["quantity"] in COLUMNS}
    assert judged == {(c.label, "its random spans", "gold_coverage") for c in results[:2]}
    row = next(row for row in rows if row["quantity"] == "gold_coverage" and row["left"] == results[0].label)
    differences = [0.5 - 0.0625 * (i % 2) for i in range(12)]
    assert row["difference"] == pytest.approx(np.mean(differences))
    assert (row["low"], row["high"]) == interval(differences, 42, "select-random-gold_coverage")
    own = [row for row in arm_comparisons(results[0].records.on, 42) if row["quantity"] == "gold_coverage"]
    assert [(row["right"], row["difference"], row["low"]) for row in own] == [("random", row["difference"], row["low"])]
    assert not [row for row in arm_comparisons(results[2].records.on, 42) if row["quantity"] == "gold_coverage"]


def test_a_value_that_is_not_finite_is_not_left_out(results: list[ConditionResult]) -> None:
    """Missing is one thing, broken another: it must not look like a comparison of the other samples."""
    results[1].records.on[3]["comprehensiveness"] = float("nan")
    rows = grid_comparisons(results, 42)
    row = next(row for row in rows if row["quantity"] == "comprehensiveness")
    assert (row["n"], row["difference"], row["verdict"]) == (12, None, "not resolved")


def test_tables_have_a_column_each(results: list[ConditionResult]) -> None:
    for c in results:
        c.results.metrics.update(run_metrics(c.records.on, c.records.off))
    table = conditions_table(results).set_index("condition")
    assert table.loc["delimiter", "gold_coverage"] == 0.75
    assert table.loc["delimiter", "gold_coverage_random"] == pytest.approx(0.03125)
    assert table["lds"].isna().tolist() == [c == "wrong_demo" for c in table.index]
    on_table = OnTable()
    for record in results[1].records.on:
        on_table.add_on({**record, "topk": {}}, {"query_text": "", "answer_text": "", "spans": []})
    frame = on_table.frame()
    assert list(frame.columns)[-5:] == ["gold_coverage", "gold_coverage_random_mean", "lds", "comprehensiveness", "spans"]
    assert frame["gold_coverage_random_mean"].tolist() == [0.0625 * (i % 2) for i in range(12)]
    assert frame["lds"].isna().sum() == 2


def test_records_keep_the_attention_to_gold_tokens() -> None:
    heads = [{"type": "heads", "window": None, "layers": [3], "total": [[1.0]], "n": 2}] * 2
    assert collect([*heads, making.off()]).heads == heads


def test_columns_of_arms() -> None:
    assert [quantity.column("select") for quantity in JUDGED] == list(COLUMNS)
    assert GOLD_COVERAGE.column("random") == "gold_coverage_random"
    assert COMPREHENSIVENESS.label_with_unit == "comprehensiveness, nats"


def test_constants_have_no_ranks() -> None:
    assert spearman([1, 2, 3], [5, 5, 5]) is spearman([1.0], [2.0]) is spearman([], []) is None
    assert spearman([1, 2, 3], [1, 9, 10]) == pytest.approx(1)
