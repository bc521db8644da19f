"""KL along base's own answers to OFF prompts in paired comparisons; and what a comparison says that it does not decide."""

from __future__ import annotations

import pytest

from cedkv.analysis.comparison import grid_comparisons, series
from cedkv.analysis.findings import compare_conditions
from cedkv.analysis.quantities import OFF_FURTHER
from cedkv.analysis.results import ConditionResult
from cedkv.report.summary import summary_markdown
from cedkv.report.tables import conditions_table
from cedkv.tasks.load import Unusable
from tests.support import making

MODES = ("attention_diversity_span", "delimiter_span", "causal_drop_span")


def grid(*given: dict[str, object]) -> list[ConditionResult]:
    return making.grid(*(({"select.mode": mode}, values) for mode, values in zip(MODES, given, strict=False)))


@pytest.fixture
def results() -> list[ConditionResult]:
    """Base's answer to the first prompt ends at once; the third condition was recorded by an older version."""
    found = grid({"off_extra": making.further(0.5, 0.5)}, {"off_extra": making.further(0.25, 0.25, 0.25)}, {})
    for i, record in enumerate(found[1].records.off):
        record["further_kl"] = [0.25 + 0.01 * i] * 3
    for condition in found[:2]:
        condition.records.off[0]["further_kl"] = []
    return found


def test_a_prompt_counts_once_and_one_without_positions_not_at_all(results: list[ConditionResult]) -> None:
    assert series(results[0], OFF_FURTHER) == [0.5] * 11
    assert series(results[2], OFF_FURTHER) == []
    rows = [row for row in grid_comparisons(results, 42) if row["quantity"] == "off_further_kl"]
    (row,) = rows
    assert (row["left"], row["right"], row["n"]) == ("delimiter", "attention_diversity", 11)
    assert row["difference"] == pytest.approx(-0.25 + 0.01 * 6)
    assert row["verdict"] == "right higher"


def test_conditions_have_columns_for_what_was_measured() -> None:
    names = ["off_further_kl", "off_further_p99", "off_further_changed"]
    table = conditions_table(grid({"off_extra": making.further(0.5, 1.5, changed=[1])}, {}))
    measured = table[table["condition"] == "attention_diversity"].iloc[0]
    assert [measured[name] for name in names] == [1.0, 1.5, 0.5]
    assert measured["off_over_limit"] == 0.0
    assert measured["off_over_limit_upper"] == pytest.approx(1 - 0.05 ** (1 / 12))
    assert not set(names) & set(conditions_table(grid({}, {})).columns)


def test_a_summary_begins_with_what_the_comparison_does_not_decide() -> None:
    comparison = compare_conditions("x", grid({"teacher": False}, {"teacher": False}))
    assert len(comparison.undecided) == 1
    text = summary_markdown(comparison)
    assert text.index("**The teacher itself gains 0 on base (limit 0.1)") < text.index("attention_diversity")
    assert text.count("says nothing about the selection") == 1
    assert compare_conditions("x", grid({}, {})).undecided == []


def test_a_summary_says_how_many_prompts_and_samples() -> None:
    found = grid({"off_extra": making.further(0.5, 1.5)}, {})
    for condition in found:
        object.__setattr__(condition, "unusable", (Unusable("ON", "too long", 3, ("on-7",)),))
    text = summary_markdown(compare_conditions("x", found))
    assert text.count("3 of 15 ON samples left out: too long (first: on-7, ...).") == 1
    (row,) = [line for line in text.splitlines() if line.startswith("| attention_diversity | query-aware")]
    assert row.split(" | ")[9:12] == ["0.01", "0 of 12 beyond 1 nat: at most 22 % (95 %)", "1.5"]
