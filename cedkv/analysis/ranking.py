"""From finished conditions to a leaderboard: cells, the samples that methods have in common, and their overall rank. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cedkv.analysis.leaderboard import Cell, Column, ColumnHead, Entry, Leaderboard, Row
from cedkv.analysis.paired import gap_recovered, share_interval
from cedkv.analysis.ranks import Array, MeanRanks, Outcomes, mean_ranks
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import number
from cedkv.core.values import Record
from cedkv.metrics_phase2 import difference, mean, relative_kl


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
