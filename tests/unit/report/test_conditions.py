"""Conditions in tables, words and on the console: by groups, each from the best down, readable when there are many."""

from __future__ import annotations

import math

import pytest

from cedkv.analysis.best import by_group
from cedkv.analysis.findings import compare_conditions
from cedkv.analysis.results import ConditionResult
from cedkv.report.figures.charts import ordered_rows
from cedkv.report.figures.plotting import Mark, Row
from cedkv.report.summary import summary_markdown
from cedkv.report.tables import conditions_table
from cedkv.report.text import aligned
from tests.support import making

ORDER = ["causal_drop", "attention_diversity", "delimiter", "oracle", "random"]
"""Two candidates that see the query, one that does not, two points of reference; all answer alike, so in a group by KL."""
GROUPS = ["query-aware candidates"] * 2 + ["query-agnostic candidates"] + ["reference points"] * 2


@pytest.fixture
def results() -> list[ConditionResult]:
    """The farther candidate first, as configured, and the nearest of all a point of reference."""
    given = {"attention_diversity": 0.6, "random": 0.9, "causal_drop": 0.5, "oracle": 0.1, "delimiter": 0.2}
    return making.grid(*[({"select.mode": f"{mode}_span"}, {"kl": kl}) for mode, kl in given.items()])


def test_tables_and_summary_list_conditions_by_group(results: list[ConditionResult]) -> None:
    assert [c.label for c in by_group(results)] == ORDER
    table = conditions_table(results)
    assert list(table["condition"]) == ORDER
    assert list(table["query"]) == ["query-aware", "query-aware", "query-agnostic", "query-aware", "query-agnostic"]
    assert list(table["kind"]) == ["candidate"] * 3 + ["oracle", "reference"]
    text = summary_markdown(compare_conditions("x", results))
    rows = [line.split(" | ") for line in text[text.index("## Conditions") :].splitlines() if line.count(" | ") == 13]
    assert [row[:2] for row in rows[2:]] == [
        ["| causal_drop", "query-aware"],
        ["| attention_diversity", "query-aware"],
        ["| delimiter", "query-agnostic"],
        ["| oracle *(oracle)*", "query-aware"],
        ["| random *(reference)*", "query-agnostic"],
    ]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_condition_without_a_finite_kl_is_the_last_of_its_group(
    results: list[ConditionResult], missing: float | None
) -> None:
    """Of those that answer alike: a single sample without a KL leaves no mean to rank by."""
    results[2].records.on[3]["kl_select_teacher"] = missing
    assert [c.label for c in by_group(results)] == ["attention_diversity", "causal_drop", *ORDER[2:]]


def test_in_a_group_accuracy_goes_before_kl() -> None:
    """The farther candidate answers one sample more; a point of reference that answers all stays behind the candidates."""
    right = [True] * 7 + [False] * 5
    results = making.grid(
        ({"select.mode": "oracle_span"}, {"kl": 0.1}),
        ({"select.mode": "causal_drop_span"}, {"kl": 0.5, "correct": [*right[1:], False]}),
        ({"select.mode": "attention_diversity_span"}, {"kl": 0.6, "correct": right}),
    )
    assert [c.label for c in by_group(results)] == ["attention_diversity", "causal_drop", "oracle"]


def test_figures_have_a_heading_for_each_group_where_there_are_several(results: list[ConditionResult]) -> None:
    def row(c: ConditionResult) -> Row:
        return Row(c.label, Mark(0.0))

    shown = [row.label or row.heading for row in ordered_rows(results, row)]
    assert shown == [
        "query-aware candidates", *ORDER[:2], "query-agnostic candidates", "delimiter", "reference points", *ORDER[3:]
    ]  # fmt: skip
    assert [row.label or row.heading for row in ordered_rows(results[:1], row)] == ["attention_diversity"]


def test_the_console_shows_many_conditions_a_line_each_under_their_group() -> None:
    """All selectors that need no pass of their own at several budgets, and settings that make a label of 70 characters."""
    modes = ("attention_diversity_span", "delimiter_span", "random_span", "full_demo", "sink_recent", "oracle_span")
    settings = [{"select.mode": mode, "select.span_budget": str(n)} for mode in modes for n in range(1, 7)]
    settings.append({"select.span_len": "4", "select.span_budget": "8", "select.min_span_distance": "4"})
    results = making.grid(*[(setting, {"kl": 0.1 + i}) for i, setting in enumerate(settings)])
    assert max(len(c.label) for c in results) > 65
    lines = aligned(results).splitlines()
    assert max(map(len, lines)) <= 110
    head = lines.index(next(line for line in lines if line.startswith("condition")))
    body = lines[head + 1 :]
    headings = [line for line in body if not line.startswith(" ")]
    assert headings == list(dict.fromkeys(c.group for c in by_group(results)))
    rows = [line for line in body if line.endswith(("pass", "fail"))]
    assert len(rows) == len(results) == 37
    assert len(body) <= len(rows) + len(headings) + 2, "only the longest label goes on below"
    assert {row.index("pass", 60) for row in rows} == {lines[head].index("gateA")}, "a column that is not straight"
    assert sum("(oracle)" in row for row in rows) == 6
