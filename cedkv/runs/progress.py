"""Progress and wall time of a run: a bar on a terminal; elsewhere lines, one per unit and one every half minute."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import click
from tqdm import tqdm

LINE_INTERVAL = 30.0
"""Seconds at least between two lines about a unit that is not done yet."""


EVALUATE = "evaluate"
"""The stage of a run in which several units are computed at once, whose arms have no time of their own."""


class _UnderWay(NamedTuple):
    """Evaluations of a unit: those of its finished arms, and those of the arm that is computed now."""

    done: int
    pending: int


class Progress:
    """Counts evaluations (sample x arm) and reports on stderr how far a run is; several units may be under way at once."""

    def __init__(self, left: Mapping[str, int], done: Sequence[int]) -> None:
        """Start counting.

        Args:
            left: key of each unit that is to be computed -> its evaluations.
            done: evaluations of the units that an earlier process has finished.
        """
        self._sizes, self._under_way = left, dict[str, _UnderWay]()
        self._units, self._units_done = len(left) + len(done), len(done)
        self._total, self._count, self._finished = sum(left.values()) + sum(done), sum(done), sum(done)
        self._count_at_start, self._started = self._count, time.monotonic()
        self._prints_lines, self._last_line = not sys.stderr.isatty(), -math.inf
        self._bar = tqdm(total=self._total, initial=self._count, unit="eval", desc="start", disable=None, dynamic_ncols=True)

    def step(self, unit: str, arm: str, count: int) -> None:
        """Begin an arm of ``count`` evaluations of a unit; the unit's arm before it is done."""
        before = self._under_way.get(unit, _UnderWay(0, 0))
        self._under_way[unit] = _UnderWay(before.done + before.pending, count)
        self._advance()
        now = arm if len(self._under_way) == 1 else f"{len(self._under_way)} units at once"
        self._bar.set_description(now)
        if self._prints_lines and time.monotonic() - self._last_line >= LINE_INTERVAL:
            click.echo(f"{now} ({self._count:,} of {self._total:,} evaluations done)", err=True)
            self._last_line = time.monotonic()

    def unit(self, key: str) -> None:
        """Report that a unit is done and on disk."""
        self._under_way.pop(key, None)
        self._finished += self._sizes[key]
        self._advance()
        self._units_done += 1
        if self._prints_lines:
            click.echo(f"{key} done ({self._units_done} of {self._units} units{self._remaining()})", err=True)
            self._last_line = time.monotonic()

    def close(self) -> None:
        """Close the bar, which stays visible."""
        self._bar.close()

    def _remaining(self) -> str:
        """Return the time left at the pace of this process so far; nothing at the end."""
        computed, left = self._count - self._count_at_start, self._total - self._count
        if left <= 0 or not computed:
            return ""
        return f", about {tqdm.format_interval((time.monotonic() - self._started) / computed * left)} left"

    def _advance(self) -> None:
        """Count anew. A unit that is computed a second time, because its worker died, counts as one all the same."""
        count = self._finished + sum(min(unit.done, self._sizes[key]) for key, unit in self._under_way.items())
        self._bar.update(max(0, count - self._count))
        self._count = max(count, self._count)


def stage_of(arm: str) -> str:
    """Return the stage that an arm belongs to: numbered ones (``random 2/5``, ``repeat 1: select``) count as one."""
    return re.split(r" \d", arm)[0]


class Clock:
    """Measures wall time by stage; a stage lasts until the next one begins."""

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        """Start the clock at the stage ``start``; ``earlier``: seconds by stage that count too."""
        self.seconds: dict[str, float] = defaultdict(float, earlier or {})
        self._stage, self._since = "start", time.perf_counter()

    def enter(self, arm: str) -> None:
        """Begin the stage of an arm (``stage_of``)."""
        now = time.perf_counter()
        self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage_of(arm), now

    def read(self) -> dict[str, float]:
        """Return the seconds by stage, the current one included."""
        self.enter(self._stage)
        return {stage: round(value, 3) for stage, value in self.seconds.items()}
