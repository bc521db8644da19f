"""A comparison in words: ``summary.md``, and the description of its run in the MLflow UI."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cedkv.analysis.best import by_group
from cedkv.analysis.comparison import unique_up_to_padding
from cedkv.analysis.findings import ComparisonResult
from cedkv.analysis.leaderboard import Leaderboard
from cedkv.analysis.paired import gap_recovered
from cedkv.analysis.quantities import QUANTITIES
from cedkv.analysis.results import ConditionResult, verdict_word
from cedkv.core.text import escape_markdown, number, plural, sentence
from cedkv.report.leaderboard import leaderboard_markdown
from cedkv.report.text import beyond_limit, describe_run, samples_of

Section = list[str]
_LEADS = {
    "resolved": "wins",
    "unresolved": "comes first, but its lead is not resolved",
    "only": "is the only candidate left",
}


def summary_markdown(comparison: ComparisonResult, limit: int | None = None) -> str:
    """Return the summary as markdown: the winner in plain words, then the tables.

    Args:
        limit: most characters; beyond it, sections and rows of tables are left out from the end, and the text says so.
    """
    return _fit(_sections(comparison), limit)


def tasks_markdown(name: str, board: Leaderboard, comparisons: Mapping[str, ComparisonResult], limit: int | None = None) -> str:
    """Return the summary of a comparison on several tasks: the matrix, then what is said of each task.

    Args:
        limit: as for ``summary_markdown``.
    """
    sections = [[f"# {name}", ""], *leaderboard_markdown(board)]
    for task, comparison in comparisons.items():
        head, *rest = _sections(comparison)
        sections.append([f"## {escape_markdown(task)}", *head[1:]])
        sections += [[re.sub("^## ", "### ", line) for line in section] for section in rest]
    return _fit(sections, limit)


def _sections(comparison: ComparisonResult) -> list[Section]:
    sections = [
        _head(comparison),
        _questions(comparison.questions),
        _conditions(comparison.conditions),
        _relations(comparison.relations),
        _identical(comparison.identical),
        _comparisons(comparison.comparisons),
    ]
    return [section for section in sections if section]


def _head(comparison: ComparisonResult) -> Section:
    results, best = comparison.conditions, comparison.best
    first = results[0]
    passing = {gate: sum(c.results.verdicts.get(gate, False) for c in results) for gate in ("gateA", "gateB")}
    lines = [f"# {comparison.name}", ""]
    for note in comparison.undecided:
        lines += [f"**{_escape_bars(sentence(note))}.**", ""]
    if best.condition is None:
        lines += [f"**No winner.** {sentence(best.rule.removeprefix('no winner: '))}."]
    else:
        lines += [f"**{best.condition.label}** {_LEADS[best.lead]}: {_escape_bars(best.rule)}."]
    run = escape_markdown(describe_run(first.config, len(first.records.on), len(first.records.off)))
    lines += [
        "",
        f"{plural(len(results), 'condition')} on the same samples ({run}); {passing['gateA']} pass Gate A, "
        f"{passing['gateB']} pass Gate B.",
    ]
    for note in dict.fromkeys(line for c in results for line in samples_of(c)):
        lines += ["", f"{escape_markdown(note)}."]
    return [*lines, ""]


def _questions(questions: Sequence[dict[str, Any]]) -> Section:
    rows = [f"- **{row['question']}** {_escape_bars(row['answer'])}" for row in questions[1:]]
    head = (
        "Intervals are 95 %, over samples, paired where two things are compared, and not corrected for the number of answers."
    )
    return ["## Answers", "", head, "", *rows, ""] if rows else []


def _conditions(results: Sequence[ConditionResult]) -> Section:
    unique = {id(c) for c in unique_up_to_padding(results)}
    head = (
        "Candidates whose selector sees the query first, then those whose selector does not, then reference points (for "
        "comparison only; they never win), each from the most accurate down."
    )
    columns = (
        "condition",
        "query",
        "tokens kept",
        "accuracy",
        "random",
        "gap recovered",
        "KL to teacher",
        "ratio to base",
        "ratio among labels",
        "OFF p99",
        "OFF prompts",
        "further OFF p99",
        "Gate A",
        "Gate B",
    )
    rows = []
    for c in by_group(results):
        m = c.results.metrics
        kind = " *(oracle)*" if c.oracle else " *(reference)*" if c.reference else ""
        kind += "" if id(c) in unique else " *(mathematically identical)*"
        gap = gap_recovered(c.records.on, c.config.seed)
        gates = (c.results.verdicts.get(gate) for gate in ("gateA", "gateB"))
        rows.append(
            (
                c.label + kind,
                c.query,
                number(_tokens_kept(c)),
                number(m["phase2_on_acc_student_select"]),
                number(m["phase2_on_acc_student_random_mean"]),
                _with_interval(gap["value"], gap["low"], gap["high"]),
                number(m["phase2_kl_select_teacher_mean"]),
                number(m["phase2_rel_kl_to_teacher_select"]),
                number(m["phase2_rel_kl_labels_select"]),
                number(m["phase2_off_delta_p99_select"]),
                beyond_limit(c) or "–",
                number(m["phase2_off_further_kl_p99"]),
                *("–" if passed is None else verdict_word(passed) for passed in gates),
            )
        )
    m = results[0].results.metrics
    levels = (
        f"base answers {number(m['phase2_on_acc_base'])}, the teacher {number(m['phase2_on_acc_teacher'])}; "
        f"base's KL to the teacher is {number(m['phase2_kl_base_teacher_mean'])} nats"
    )
    return ["## Conditions", "", f"{head} {sentence(levels)}.", "", *_table(columns, rows, numeric=(*range(2, 10), 11)), ""]


def _relations(relations: Sequence[dict[str, Any]]) -> Section:
    emphasis = {"does not hold": "**does not hold**"}
    rows = [(row["relation"], emphasis.get(row["here"], row["here"]), row["figures"]) for row in relations]
    return ["## Known relations", "", *_table(("relation", "here", "figures"), rows), ""] if rows else []


def _identical(equal: Sequence[dict[str, Any]]) -> Section:
    rows = [
        (
            row["left"],
            row["right"],
            row["quantity"],
            number(row["largest"]),
            number(row["limit"]),
            number(row["floor"]),
            row["verdict"] if row["verdict"] == "pass" else f"**{row['verdict']}**",
        )
        for row in sorted(equal, key=lambda row: row["verdict"] == "pass")
    ]
    columns = ("left", "right", "quantity", "largest", "limit", "floor", "verdict")
    table = _table(columns, rows, numeric=(3, 4, 5))
    return ["## Mathematically identical conditions", "", *table, ""] if rows else []


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> Section:
    rows = [
        (
            f"{row['left']} − {row['right']}",
            QUANTITIES[row["quantity"]].label_with_unit,
            str(row["n"]),
            _with_interval(row["difference"], row["low"], row["high"]),
            _p(row["p_holm"]),
            row["verdict"],
            "–" if row["n_needed"] is None else str(row["n_needed"]),
        )
        for row in sorted(comparisons, key=lambda row: row["verdict"] == "not resolved")
    ]
    columns = ("left − right", "quantity", "n", "difference, 95 %", "p (Holm)", "verdict", "n needed")
    resolved = sum(row["verdict"] != "not resolved" for row in comparisons)
    head = (
        f"{resolved} of {plural(len(comparisons), 'comparison')} resolved: p < 0.05 after Holm's correction over all of them, "
        "and an interval without 0. *n needed*: samples a single test needs to resolve this difference in 4 of 5 cases."
    )
    return ["## Paired comparisons", "", head, "", *_table(columns, rows, numeric=(2, 3, 4, 6)), ""] if rows else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> Section:
    alignment = ["---:" if i in numeric else "---" for i in range(len(columns))]
    cells = [columns, alignment, *([_escape_bars(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _fit(sections: Sequence[Section], limit: int | None) -> str:
    """Return the sections as text of at most ``limit`` characters.

    Lines are left out from the end; a heading or the head of a table that would remain without a row below it goes too.
    """
    text = "\n".join(line for section in sections for line in section)
    if limit is None or len(text) <= limit:
        return text.rstrip() + "\n"
    notice = "\n*The rest is in summary.md.*\n"
    text = ""
    for section in sections:
        for i, line in enumerate(section):
            if len(text) + len(line) + 1 + len(notice) > limit:
                heading = text.rstrip().rfind("\n## ")
                if i and heading >= 0 and not _has_rows(section[:i]):
                    text = text[:heading]
                return text.rstrip() + "\n" + notice
            text += line + "\n"
    return text.rstrip() + "\n"


def _has_rows(lines: Sequence[str]) -> bool:
    table = [line for line in lines if line.startswith("|")]
    return len(table) > 2 or any(line.startswith("- ") for line in lines)


def _escape_bars(text: str) -> str:
    """Return the text with ``|`` escaped, which would end a cell of a table."""
    return text.replace("|", "\\|")


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return number(value)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]".replace("-", "−")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def _tokens_kept(condition: ConditionResult) -> float | None:
    """Return the mean number of tokens kept per ON sample."""
    counts = condition.records.kept_tokens
    return float(np.mean(counts)) if counts else None
