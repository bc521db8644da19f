"""Waiting for what another process or thread does: with patience, since a machine may be loaded; what hangs, hangs longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 300.0
"""Seconds within which everything here happens on a loaded machine too."""
HANGING = 10 * PATIENCE
"""Seconds that what hangs in a test would last."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; fail, saying what has not happened, after ``PATIENCE``."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"has not happened in {PATIENCE:.0f} s: {what}"
        time.sleep(0.02)


@contextmanager
def no_hang() -> Iterator[None]:
    """Hold that what is done inside does not wait for something that hangs."""
    since = time.monotonic()
    yield
    assert time.monotonic() - since < PATIENCE
