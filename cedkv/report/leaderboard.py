"""A leaderboard in words: for the console, as markdown, and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cedkv.analysis.leaderboard import Cell, ColumnHead, Leaderboard, Row, rank_with_interval, table
from cedkv.core.text import escape_markdown, number, plural, sentence, wrapped

CONSOLE_WIDTH = 110
HOW_RANKED = (
    "Candidates are ranked on each task by accuracy, equal ones by the KL ratio to the teacher, still equal ones share their "
    "ranks; the mean rank is over the tasks that count, and its brackets hold a 95 % bootstrap interval over the samples of "
    "each task, the same samples for all methods. A task on which the teacher does not gain on base decides nothing about "
    "selection and does not count. Points of reference are compared with and not ranked."
)


@dataclass(frozen=True)
class Measure:
    """A number of every cell: its name, label and unit, and where the cell has its value and the ends of its interval."""

    name: str
    label: str
    unit: str
    value: str
    ends: tuple[str, str] | None = None

    def of(self, cell: Cell) -> float | None:
        """Return its value."""
        value: float | None = getattr(cell, self.value)
        return value

    def interval(self, cell: Cell) -> tuple[float, float] | None:
        """Return its 95 % interval; None where there is none."""
        low, high = (getattr(cell, end) for end in self.ends) if self.ends else (None, None)
        return None if low is None or high is None else (low, high)

    def text(self, cell: Cell | None, digits: int = 3) -> str:
        """Return its value with the interval: ``0.5 [0.3, 0.7]``; a dash for a missing cell."""
        if cell is None:
            return "–"
        ends = self.interval(cell)
        brackets = "" if ends is None else f" [{number(ends[0], digits)}, {number(ends[1], digits)}]"
        return number(self.of(cell), digits) + brackets


MEASURES = (
    Measure("accuracy", "accuracy", "", "accuracy", ("low", "high")),
    Measure("gap_recovered", "gap recovered", "", "gap_recovered", ("gap_low", "gap_high")),
    Measure("rel_kl", "KL ratio to teacher", "", "rel_kl"),
    Measure("off_p99", "OFF p99", "nats", "off_p99"),
)
"""What the matrix shows, one at a time."""


def groups(board: Leaderboard) -> list[tuple[str, list[Row]]]:
    """Return the rows under the headings that every leaderboard lists them in."""
    candidates = [row for row in board.rows if not row.reference]
    return [
        (name, rows)
        for name, rows in (
            ("candidates", [row for row in candidates if row.mean_rank is not None]),
            ("candidates without an overall rank", [row for row in candidates if row.mean_rank is None]),
            ("reference points", [row for row in board.rows if row.reference]),
        )
        if rows
    ]


def column_name(board: Leaderboard, head: ColumnHead) -> str:
    """Return the name of a column: the task, and the model where there are several."""
    return f"{head.task} · {head.model}" if len(board.models) > 1 else head.task


def console_matrix(board: Leaderboard) -> str:
    """Return ranks and accuracies as aligned text, as many columns as fit; the other ones are counted."""
    heads = list(board.columns.values())
    widths = [min(24, max(8, len(column_name(board, head)))) for head in heads]
    shown, room = 0, CONSOLE_WIDTH - 36 - 18
    while shown < len(heads) and sum(widths[: shown + 1]) + 2 * (shown + 1) <= max(room, widths[0] + 2):
        shown += 1
    heads, widths = heads[:shown], widths[:shown]

    def line(label: str, rank: str, cells: Sequence[str]) -> str:
        columns = "".join(f"  {_cut(cell, width):>{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{label:<36}{rank:>18}{columns}".rstrip()

    lines = [line("accuracy", "mean rank", [column_name(board, head) for head in heads])]
    for arm in ("base", "teacher"):
        lines.append(line(f"  {arm}", "", [number(getattr(head, f"acc_{arm}")) for head in heads]))
    for name, rows in groups(board):
        lines.append(name)
        for row in rows:
            label, *settings = wrapped(row.method, 32)
            cells = [row.cells.get((head.model, head.task)) for head in heads]
            accuracies = [number(None if cell is None else cell.accuracy) for cell in cells]
            rank = "" if row.mean_rank is None else rank_with_interval(row)
            lines.append(line(f"  {label}", rank, accuracies))
            lines += [f"    {setting}" for setting in settings]
    if shown < len(board.columns):
        lines.append(f"and {plural(len(board.columns) - shown, 'more column')} (leaderboard.csv)")
    return "\n".join([*lines, *warnings(board)])


def warnings(board: Leaderboard) -> list[str]:
    """Return a line for every column that does not count for the overall rank."""
    left_out = (head for head in board.columns.values() if head.left_out)
    return [f"note     {column_name(board, head)} does not count: {head.left_out}" for head in left_out]


def leaderboard_markdown(board: Leaderboard) -> list[list[str]]:
    """Return the sections of the matrix as lines of markdown: what comes first, then a table per measure."""
    best = board.best
    lead = f"**No overall rank.** {sentence(board.rule.removeprefix('no overall rank: '))}."
    if best is not None:
        lead = f"**{escape_markdown(best.method)}** comes first: {escape_markdown(board.rule)}."
    left_out = [f"- {escape_markdown(line.removeprefix('note     '))}." for line in warnings(board)]
    sections = [[lead, "", *left_out, *([""] if left_out else []), HOW_RANKED, ""]]
    heads = list(board.columns.values())
    names = [escape_markdown(column_name(board, head)) for head in heads]
    for measure in MEASURES:
        lines = [f"## {sentence(measure.label)}{f', {measure.unit}' if measure.unit else ''}", ""]
        lines += [f"| method | mean rank | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
        for name, rows in groups(board):
            for row in rows:
                kind = " *(reference)*" if name == "reference points" else ""
                rank = "–" if row.mean_rank is None else rank_with_interval(row)
                cells = [measure.text(row.cells.get((head.model, head.task))) for head in heads]
                lines.append(f"| {escape_markdown(row.method)}{kind} | {rank} | {' | '.join(cells)} |")
        sections.append([*lines, ""])
    return sections


def frame(board: Leaderboard) -> pd.DataFrame:
    """Return the leaderboard in long form, a row per method, model and task."""
    return pd.DataFrame(table(board))


def describe(board: Leaderboard) -> str:
    """Return how large the leaderboard is, in words."""
    models = board.models[0] if len(board.models) == 1 else plural(len(board.models), "model")
    return f"{models}, {plural(len(board.tasks), 'task')}, {plural(len(board.rows), 'method')}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
