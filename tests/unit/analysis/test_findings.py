"""What a comparison answers in words, and its summary: figures by hand, verdicts on both sides, what is left out."""

from __future__ import annotations

import math

import pytest

from cedkv.analysis.contrasts import sign_of
from cedkv.analysis.families import budgets, lengths, positions, sinks, transfers
from cedkv.analysis.findings import compare_conditions, relations
from cedkv.analysis.results import ConditionResult
from cedkv.config.extensions import POSITIONING
from cedkv.report.summary import summary_markdown
from tests.support import making
from tests.support.grids import N, modes, some, standard


def test_every_standard_question_has_an_answer_with_its_verdict() -> None:
    asked = {row["question"]: row["answer"] for row in compare_conditions("x", standard()).questions}
    assert len(asked) == 8
    best, budget, sink, place, length, transfer, off, _ = asked.values()
    assert best.startswith("attention_diversity · span_budget 8: highest accuracy, 0.6 (of 6 with this accuracy the smallest ")
    assert "the smallest mean KL to teacher, 0.3" in best
    assert budget.startswith("8 spans against 1: nearer to the teacher (KL 0.3")
    assert "difference −1.2 [−1.2, −1.2]" in budget
    assert "4 spans: KL 0.5" in budget
    assert "gather, 4 sinks against 0: nearer to the teacher" in sink
    assert "sinks help gather more" in sink
    assert place.startswith("Compact against absolute: nearer to the teacher")
    assert "no resolved difference in accuracy" in place
    assert length.startswith("8 spans × 4 tokens against 4 spans × 8 tokens: farther from the teacher")
    assert transfer.startswith("Another query's spans against the query's own: farther from the teacher")
    assert off.startswith("The whole demonstration moves OFF prompts by 0.4")
    assert "OFF prompts move less under attention_diversity (p99" in off


def test_a_question_without_its_conditions_is_not_asked() -> None:
    results = making.grid(({}, {}), ({"select.mode": "delimiter_span"}, {}))
    assert [row["question"] for row in compare_conditions("x", results).questions] == ["Which condition is best?"]


def here(results: list[ConditionResult]) -> list[str]:
    return [row["here"] for row in relations(results)]


def test_known_relations_hold_or_do_not_or_are_open() -> None:
    """*No better* and *at least as many* are refuted or not; they hold only where the interval shows the difference."""
    known = {row["relation"]: row["here"] for row in relations(standard())}
    assert list(known.values()) == ["holds"] * 4 + ["not refuted"] * 2
    assert "gather without sinks is farther from the teacher than with 4 (attention_diversity · gather)" in known
    broken = standard(c0=1.4, c8=0.4, c10=0.9)
    broken[8].records.off[:] = [{**r, "phase2_delta_off_select": 0.1} for r in broken[8].records.off]
    broken[0].records.on[:] = [{**r, "correct_select": False, "correct_random": [True, True]} for r in broken[0].records.on]
    broken[2].records.on[:] = [{**r, "correct_select": True} for r in broken[2].records.on]
    broken[3].records.on[:] = [{**r, "correct_select": False} for r in broken[3].records.on]
    assert here(broken) == ["does not hold"] * 5 + ["not refuted"]
    level = making.grid(*zip(modes("attention_diversity_span", "wrong_demo"), [{"correct": some(0.5), "random": some(0.5)}] * 2,
                             strict=True), n=N)  # fmt: skip
    assert here(level) == ["not resolved", "holds", "does not hold"]


@pytest.mark.parametrize(
    ("low", "high", "found"), [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, None), (0.0, 0.0, None), (None, None, None)]
)
def test_more_is_said_beyond_zero_only(low: float | None, high: float | None, found: int | None) -> None:
    assert sign_of(low, high) is found


def test_families_take_what_else_is_the_same() -> None:
    """A budget under another sink belongs to another curve; points of reference to none."""
    results = standard()
    assert [[c.config.select.span_budget for c in group] for group in budgets(results)] == [[1, 4, 8]]
    assert [len(group) for group in sinks(results)] == [4]
    assert [[c.config.injection.positioning_mode for c in group] for group in positions(results)] == [["compact", "absolute"]]
    assert [[c.config.select.span_len for c in group] for group in lengths(results)] == [[4, 8]]
    assert [[c.config.select.mode for c in group] for group in transfers(results)] == [
        ["attention_diversity_span", "transfer_span", "wrong_demo"]
    ]


def test_too_few_samples_are_said_to_be_too_few() -> None:
    results = making.grid(*[({"select.span_budget": str(n)}, {}) for n in (1, 2)], n=1)
    answer = next(
        row["answer"]
        for row in compare_conditions("x", results).questions
        if row["question"].startswith("How much do more spans")
    )
    assert "too few samples to compare" in answer


def summary(results: list[ConditionResult], limit: int | None = None) -> str:
    return summary_markdown(compare_conditions("ablate_selector", results), limit)


def test_summary_says_all_of_it() -> None:
    text = summary(standard())
    assert text.startswith("# ablate_selector\n\n**attention_diversity · span_budget 8** ")
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        "## Answers",
        "## Conditions",
        "## Known relations",
        "## Mathematically identical conditions",
        "## Paired comparisons",
    ]
    assert "| oracle *(oracle)* |" in text
    assert "| wrong_demo *(reference)* |" in text
    assert "12 conditions on the same samples" in text
    assert "| full_demo | teacher | largest KL(select \\|\\| teacher) | 1e-09 | 0.0001 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows[:14]}) == 1, "a cell with a bar breaks its table"


@pytest.mark.parametrize("limit", [600, 2000, 5000, 7900])
def test_summary_fits_a_run_description(limit: int) -> None:
    """MLflow cuts a description at 8,000 characters, in the middle of a word; the cut is ours, between rows, and is said."""
    text = summary(standard(), limit)
    assert len(text) <= limit
    assert text.endswith("*The rest is in summary.md.*\n")
    assert not text.split("*The rest")[0].rstrip().splitlines()[-1].startswith(("## ", "| ---"))


def test_no_winner_in_words() -> None:
    results = making.grid(({}, {}), ({"select.mode": "delimiter_span"}, {}))
    for condition in results:
        condition.results.verdicts["gateA"] = False
    assert "**No winner.** No condition that is a candidate" in summary(results)


def test_nan_is_a_dash_in_words() -> None:
    results = making.grid(({}, {"kl": [math.nan] * 12}), ({"select.mode": "delimiter_span"}, {}))
    assert "nan" not in summary(results).lower()


def test_modes_of_other_packages_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POSITIONING._registered, "every_second", lambda kept, length: (kept, length))
    settings = [{"injection.positioning_mode": mode} for mode in ("compact", "every_second")]
    answers = {
        row["question"]: row["answer"] for row in compare_conditions("x", making.grid(*((s, {}) for s in settings))).questions
    }
    assert any(answer.startswith("Compact against every_second: ") for answer in answers.values())
