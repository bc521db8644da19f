"""Where a run is and where its time goes: a bar on a terminal; elsewhere lines, one per unit and one every half minute."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import click
from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines about a unit that is not done yet, at least."""


class Progress:
    """Counts evaluations (sample x arm) and says on stderr how far a run is.

    Args:
        sizes: evaluations of each unit, in order.
        done: units that were done before.
    """

    def __init__(self, sizes: Sequence[int], done: int) -> None:
        self._units, self._done = len(sizes), done
        self._total, self._count, self._pending = sum(sizes), sum(sizes[:done]), 0
        self._resumed, self._began = self._count, time.monotonic()
        self._lines, self._said = not sys.stderr.isatty(), -math.inf
        self._bar = tqdm(
            total=self._total, initial=self._count, unit="eval", desc="start", disable=None, dynamic_ncols=True
        )  # fmt: skip

    def step(self, arm: str, count: int) -> None:
        """An arm begins, of so many evaluations; the one before it is done."""
        self._advance()
        self._pending = count
        self._bar.set_description(arm)
        if self._lines and time.monotonic() - self._said >= EVERY:
            click.echo(f"{arm} ({self._count:,} of {self._total:,} evaluations done)", err=True)
            self._said = time.monotonic()

    def unit(self, key: str) -> None:
        """A unit is done and safe."""
        self._advance()
        self._done += 1
        if self._lines:
            click.echo(f"{key} done ({self._done} of {self._units} units{self._remaining()})", err=True)
            self._said = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _remaining(self) -> str:
        """Return how long the rest takes at the pace of this process so far; nothing at the end."""
        computed, left = self._count - self._resumed, self._total - self._count
        if left <= 0 or not computed:
            return ""
        return f", about {tqdm.format_interval((time.monotonic() - self._began) / computed * left)} left"

    def _advance(self) -> None:
        self._count += self._pending
        self._bar.update(self._pending)
        self._pending = 0


class Clock:
    """Wall time by stage; a stage lasts until the next one begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = "start", time.perf_counter()

    def enter(self, stage: str) -> None:
        """Begin a stage; numbered ones (``random 2/5``, ``repeat 1: select``) count as one."""
        now = time.perf_counter()
        self.seconds[self._stage] += now - self._since
        self._stage, self._since = re.split(r" \d", stage)[0], now

    def read(self) -> dict[str, float]:
        """Return the seconds by stage, the running one included."""
        self.enter(self._stage)
        return {stage: round(value, 3) for stage, value in self.seconds.items()}
