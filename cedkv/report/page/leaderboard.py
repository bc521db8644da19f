"""The page of a leaderboard: the matrix of methods, tasks and models, then every task by itself. One file, as ``report.html``.

Names of tasks, models and methods are the user's, and escaped by the template; the page holds no other text of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cedkv.analysis.leaderboard import Cell, Column, Leaderboard, Row
from cedkv.report.leaderboard import HOW_RANKED, MEASURES, column_name, describe, groups
from cedkv.report.page.render import render_page

MAX_METHODS = 200
"""Most methods in the page; the rest is in the CSV."""


def leaderboard_page(
    board: Leaderboard, title: str, subtitle: str = "", notes: Sequence[str] = (), links: Mapping[str, str] | None = None
) -> str:
    """Return the page.

    Args:
        subtitle: what was compared; by default the numbers of methods, tasks and models.
        notes: what the reader should know of how it was made, a sentence each.
        links: task -> address of a page about it alone.
    """
    shown = Leaderboard(board.columns, board.rows[:MAX_METHODS])
    return render_page(
        "leaderboard.html.j2",
        ("leaderboard.js",),
        title=title,
        subtitle=subtitle or describe(board),
        notes=notes,
        board=shown,
        n_methods=len(board.rows),
        groups=groups(shown),
        measures=MEASURES,
        how=HOW_RANKED,
        worst=max(1, len(shown.ranked)),
        tasks=[_task(shown, task, (links or {}).get(task)) for task in shown.tasks],
        column_name=column_name,
    )


def _task(board: Leaderboard, task: str, link: str | None) -> dict[str, Any]:
    """Return what the section of a task shows: its columns, and of each the rows by rank, points of reference last."""
    columns: list[tuple[Column, list[tuple[Row, Cell]]]] = []
    for column in board.columns:
        if column[1] == task:
            rows = [(row, row.cells[column]) for row in board.rows if column in row.cells]
            rows.sort(key=lambda pair: (pair[0].reference, -(pair[1].accuracy or 0.0), pair[1].rel_kl or 0.0))
            columns.append((column, rows))
    return {"name": task, "link": link, "columns": columns}
