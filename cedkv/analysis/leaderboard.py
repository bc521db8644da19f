"""Methods ranked over tasks and models: a matrix of results, and the mean rank of each method with its uncertainty. Pure.

A method is a way of selecting, whatever the model and the task. In every column (a model on a task) methods are ranked by
accuracy, equal ones by rel_kl, still equal ones share their ranks; a method's overall rank is the mean of its ranks over the
columns that count. Its interval is a percentile bootstrap over the samples of each column, the same resample for all methods
(Efron 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cedkv.analysis.paired import gap_recovered, share_interval
from cedkv.analysis.ranks import Array, MeanRanks, Outcomes, mean_ranks
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import number, plural
from cedkv.core.values import Record
from cedkv.metrics_phase2 import difference, mean, relative_kl

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


def entry_of(result: ConditionResult) -> Entry:
    """Return a finished condition as an entry, named by its label."""
    config = result.config
    return Entry(
        model=config.model.id.rstrip("/").rsplit("/", 1)[-1],
        task=config.data.task,
        method=result.label,
        reference=result.reference,
        query=result.query,
        run_ids=(result.run_id,),
        on=result.records.on,
        off_p99=result.results.metrics["phase2_off_delta_p99_select"],
        gain_min=config.thresholds.on_gain_min,
    )


def leaderboard(entries: Sequence[Entry], seed: int) -> Leaderboard:
    """Return the matrix of the entries, with an overall rank of the methods that can have one.

    A column counts for the overall rank where the teacher gains and at least two candidates were run on the same samples: its
    samples are then those that most candidates have, and of these the most. A candidate has an overall rank where it was run on
    these samples in every column that counts; the others are listed without one, as are points of reference.

    Args:
        entries: at most one per model, task and method.
        seed: of the resamples.
    """
    cells = {(entry.column, entry.method): _cell(entry, seed) for entry in entries}
    columns: dict[Column, _Samples] = {}
    models = list(dict.fromkeys(entry.model for entry in entries))
    for entry in sorted(entries, key=lambda entry: models.index(entry.model)):
        columns.setdefault(entry.column, _Samples()).entries.append(entry)
    heads = {column: _head(column, samples) for column, samples in columns.items()}
    counted = {column: samples for column, samples in columns.items() if not heads[column].left_out}
    methods = list(dict.fromkeys(entry.method for entry in entries))
    ranked = [m for m in methods if counted and all(m in samples.comparable for samples in counted.values())]
    ranks = mean_ranks({"\x1f".join(c): s.outcomes(ranked) for c, s in counted.items()}, seed) if len(ranked) > 1 else None
    rows = []
    for method in methods:
        own = {column: cells[column, method] for column in columns if (column, method) in cells}
        first = next(iter(own.values())).entry
        row = Row(method, first.reference, first.query, own)
        rows.append(row if ranks is None or method not in ranked else _ranked(row, ranked.index(method), ranks, list(counted)))
    rows.sort(key=_order)
    return Leaderboard(heads, rows)


def _order(row: Row) -> tuple[bool, bool, float, bool, float]:
    """Return what rows are sorted by."""
    return row.reference, row.mean_rank is None, row.mean_rank or 0.0, row.behind is not None, -(row.accuracy or 0.0)


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


@dataclass
class _Samples:
    """The entries of a column, complete before anything is asked of it, and what they have in common."""

    entries: list[Entry] = field(default_factory=list)

    @cached_property
    def ids(self) -> list[str]:
        """The samples that the column's methods are ranked on, in their order."""
        candidates = [entry for entry in self.entries if not entry.reference] or self.entries
        in_order = [[str(record["sample_id"]) for record in entry.on] for entry in candidates]
        sets = [frozenset(ids) for ids in in_order]
        # of the entries' sets of samples the one that most entries have all of, and of several the largest
        return max(in_order, key=lambda ids: (sum(frozenset(ids) <= other for other in sets), len(ids)))

    @cached_property
    def comparable(self) -> dict[str, Entry]:
        """The candidates that have all of these samples, by method."""
        ids = frozenset(self.ids)
        has_all = [e for e in self.entries if not e.reference and ids <= {str(record["sample_id"]) for record in e.on}]
        return {entry.method: entry for entry in has_all if ids}

    def outcomes(self, methods: Sequence[str]) -> Outcomes:
        """Return what these methods came to on the samples."""
        by_id = [{str(record["sample_id"]): record for record in self.comparable[method].on} for method in methods]
        ids = self.ids

        def values(name: str) -> Array:
            return np.array([[_number(records[i].get(name)) for records in by_id] for i in ids], dtype=float)

        return Outcomes(values("correct_select"), values("kl_select_teacher"), values("kl_base_teacher"))


def _ranked(row: Row, index: int, ranks: MeanRanks, counted: Sequence[Column]) -> Row:
    """Return the row with its rank in each column that counts, and its overall rank; ``index``: of the method in ``ranks``."""
    in_column = zip(counted, ranks.by_column[:, index], strict=True)
    cells = {**row.cells, **{column: replace(row.cells[column], rank=float(rank)) for column, rank in in_column}}
    mean_rank, low, high = (float(values[index]) for values in (ranks.mean, ranks.low, ranks.high))
    behind = None if index == int(ranks.mean.argmin()) else (float(ranks.behind[0, index]), float(ranks.behind[1, index]))
    return replace(row, cells=cells, mean_rank=mean_rank, low=low, high=high, behind=behind)


def _head(column: Column, samples: _Samples) -> ColumnHead:
    ids = set(samples.ids)
    on = [record for record in _longest(samples.entries).on if str(record["sample_id"]) in ids] or _longest(samples.entries).on
    base, teacher = (mean(bool(record[f"correct_{arm}"]) for record in on) for arm in ("base", "teacher"))
    gain, gain_min, left_out = difference(teacher, base), samples.entries[0].gain_min, ""
    gains = gain is not None and gain >= gain_min
    if not gains:
        left_out = f"the teacher gains {number(gain)} on base (limit {gain_min:g}): nothing is decided about selection"
    elif len(samples.comparable) < 2:
        left_out = "fewer than two candidates on the same samples"
    return ColumnHead(*column, n=len(ids), acc_base=base, acc_teacher=teacher, teacher_gains=gains, left_out=left_out)


def _longest(entries: Sequence[Entry]) -> Entry:
    return max(entries, key=lambda entry: len(entry.on))


def _cell(entry: Entry, seed: int) -> Cell:
    right = [bool(record["correct_select"]) for record in entry.on]
    low, high = share_interval(right)
    gap = gap_recovered(entry.on, seed)
    labelled = [record for record in entry.on if record.get("kl_select_teacher_labels") is not None]
    return Cell(
        entry=entry,
        n=len(right),
        accuracy=mean(right),
        low=low,
        high=high,
        gap_recovered=gap["value"],
        gap_low=gap["low"],
        gap_high=gap["high"],
        rel_kl=_relative_kl(entry.on, ""),
        rel_kl_labels=_relative_kl(labelled, "_labels"),
        off_p99=entry.off_p99,
    )


def _relative_kl(on: Sequence[Record], of: str) -> float | None:
    select, base = ([_number(record.get(f"kl_{arm}_teacher{of}")) for record in on] for arm in ("select", "base"))
    return relative_kl(select, base)


def _number(value: Any) -> float:
    """Return a number of a record; infinity for one that is missing or not a number."""
    return float(value) if value is not None and not math.isnan(value) else math.inf
