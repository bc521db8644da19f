"""Methods ranked over tasks and models: a matrix of results, and the mean rank of each method with its uncertainty. Pure.

A method is a way of selecting, whatever the model and the task. In every column (a model on a task) methods are ranked by
accuracy, equal ones by rel_kl, still equal ones share their ranks; a method's overall rank is the mean of its ranks over the
columns that count. Its interval is a percentile bootstrap over the samples of each column, the same resample for all methods
(Efron 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cedkv.core.text import number, plural
from cedkv.core.values import Record
from cedkv.metrics_phase2 import mean

Column = tuple[str, str]
"""Model and task."""


@dataclass(frozen=True)
class Entry:
    """What a method did on a task with a model: the records of its ON samples, of one run or several pooled.

    reference: a point of reference (an oracle is one too), which is not ranked. query: whether its selector sees the query.
    off_p99: 99th percentile of the OFF prompts' KL, the largest of the runs'. gain_min: of ``thresholds.on_gain_min``, what
    select must gain on base to pass: a teacher that gains less decides nothing about selection.
    """

    model: str
    task: str
    method: str
    reference: bool
    query: str
    run_ids: tuple[str, ...]
    on: Sequence[Record]
    off_p99: float | None
    gain_min: float

    @property
    def column(self) -> Column:
        """Where it stands in the matrix."""
        return self.model, self.task


@dataclass(frozen=True)
class Cell:
    """A method's results in a column, each of which is None where it is not defined; ``low`` and ``high`` are 95 % intervals.

    rank: among the methods that have an overall rank, on the samples that these have in common.
    """

    entry: Entry
    n: int
    accuracy: float | None
    low: float | None
    high: float | None
    gap_recovered: float | None
    gap_low: float | None
    gap_high: float | None
    rel_kl: float | None
    rel_kl_labels: float | None
    off_p99: float | None
    rank: float | None = None


@dataclass(frozen=True)
class ColumnHead:
    """A model on a task.

    n: samples that the ranked methods have in common.
    left_out: why the column does not count for the overall rank; empty where it does.
    """

    model: str
    task: str
    n: int
    acc_base: float | None
    acc_teacher: float | None
    teacher_gains: bool
    left_out: str


@dataclass(frozen=True)
class Row:
    """A method: its cells by column, and its overall rank where it has one.

    behind: 95 % interval of its mean rank less that of the first method; None for the first one and without a rank.
    """

    method: str
    reference: bool
    query: str
    cells: Mapping[Column, Cell]
    mean_rank: float | None = None
    low: float | None = None
    high: float | None = None
    behind: tuple[float, float] | None = None

    @property
    def accuracy(self) -> float | None:
        """Its accuracy, mean over its cells."""
        return mean(cell.accuracy for cell in self.cells.values() if cell.accuracy is not None)


@dataclass(frozen=True)
class Leaderboard:
    """The matrix: rows from the best down, candidates with an overall rank first, then the others, then points of reference."""

    columns: dict[Column, ColumnHead]
    rows: list[Row]

    @property
    def models(self) -> list[str]:
        """The models, in their order."""
        return list(dict.fromkeys(model for model, _ in self.columns))

    @property
    def tasks(self) -> list[str]:
        """The tasks, in their order."""
        return list(dict.fromkeys(task for _, task in self.columns))

    @property
    def counted(self) -> list[ColumnHead]:
        """The columns that the overall rank is over."""
        return [head for head in self.columns.values() if not head.left_out]

    @property
    def ranked(self) -> list[Row]:
        """The rows with an overall rank, from the best down."""
        return [row for row in self.rows if row.mean_rank is not None]

    @property
    def best(self) -> Row | None:
        """The method that comes first, if methods could be ranked."""
        return self.ranked[0] if self.ranked else None

    @property
    def rule(self) -> str:
        """How the best method was found, and how sure that is, in words."""
        best = self.best
        if best is None:
            return f"no overall rank: {self._why_unranked()}"
        _, *others = self.ranked
        rule = (
            f"lowest mean rank, {rank_with_interval(best)}, of {plural(len(self.ranked), 'method')} over "
            f"{plural(len(self.counted), 'column' if len(self.models) > 1 else 'task')}"
        )
        close = [row.method for row in others if row.behind is not None and row.behind[0] <= 0]
        if not close:
            return f"{rule}; ahead of all others (95 % intervals of differences)"
        if len(close) == len(others):
            return f"{rule}; not resolved from any other"
        return f"{rule}; not resolved from {', '.join(close[:3])}" + (f" and {len(close) - 3} more" if len(close) > 3 else "")

    def _why_unranked(self) -> str:
        if self.counted:
            return "no two candidates were run on the same samples of every task"
        if not any(head.teacher_gains for head in self.columns.values()):
            return "on no task does the teacher gain on base, so nothing is decided about selection"
        return "on no task where the teacher gains are there two candidates on the same samples"


def rank_with_interval(row: Row) -> str:
    """Return a mean rank with its interval: ``1.5 [1, 2]``."""
    return f"{number(row.mean_rank, 3)} [{number(row.low, 3)}, {number(row.high, 3)}]"


def table(board: Leaderboard) -> list[dict[str, Any]]:
    """Return the leaderboard in long form: a row per method, model and task."""
    rows = []
    for row in board.rows:
        for column, cell in row.cells.items():
            head = board.columns[column]
            rows.append(
                {
                    "method": row.method,
                    "model": head.model,
                    "task": head.task,
                    "kind": "reference" if row.reference else "candidate",
                    "query": row.query,
                    "n": cell.n,
                    "accuracy": cell.accuracy,
                    "accuracy_low": cell.low,
                    "accuracy_high": cell.high,
                    "acc_base": head.acc_base,
                    "acc_teacher": head.acc_teacher,
                    "teacher_gains": head.teacher_gains,
                    "gap_recovered": cell.gap_recovered,
                    "gap_recovered_low": cell.gap_low,
                    "gap_recovered_high": cell.gap_high,
                    "rel_kl": cell.rel_kl,
                    "rel_kl_labels": cell.rel_kl_labels,
                    "off_p99": cell.off_p99,
                    "rank": cell.rank,
                    "mean_rank": row.mean_rank,
                    "mean_rank_low": row.low,
                    "mean_rank_high": row.high,
                    "run_ids": " ".join(cell.entry.run_ids),
                }
            )
    return rows
