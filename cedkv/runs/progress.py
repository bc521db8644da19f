"""Progress of a run through its units: a bar on a terminal; elsewhere lines, one a unit and one in every half minute."""

from __future__ import annotations

import math
import sys
import time
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
            click.echo(f"{key} done ({self._done} of {self._units} units)", err=True)
            self._said = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _advance(self) -> None:
        self._count += self._pending
        self._bar.update(self._pending)
        self._pending = 0
