"""The engine against the loop one would write without it (``reference.py``): the same results, and how much sooner."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.common import Row, engine, loaded, median_ratio, paired, part, quickstart, results_only, row
from benchmarks.reference import Reference, largest_difference
from cedkv.models import smollm2

PAIRS, SAMPLES = 1, 16
"""So often, on so many ON samples (others each time), with their OFF prompts."""
AGREE = 1e-4
"""Nats."""


def rows(pairs: int = PAIRS, samples: int = SAMPLES) -> list[Row]:
    """Wall time of the reference over the engine's, and the largest difference of their results."""
    lm, every = loaded()
    config = results_only(quickstart())
    reference = Reference(smollm2.folder(None))
    parts = [part(every, at * samples, samples) for at in range(pairs)]
    found: dict[tuple[str, int], list[Any]] = {}

    def plain(at: int) -> None:
        found["reference", at] = reference.evaluate(config, parts[at])

    def own(at: int) -> None:
        found["engine", at] = engine(lm, config, parts[at])

    engine(lm, config, part(every, 0, 2))
    reference.evaluate(config, part(every, 0, 1))
    times = paired([partial(plain, at) for at in range(pairs)], [partial(own, at) for at in range(pairs)])
    worst = max(largest_difference(found["engine", at], found["reference", at]) for at in range(pairs))
    return [
        row(f"naive loop over engine, wall time ({pairs} x {samples} samples)", median_ratio(times), ">= 2.5"),
        row("naive loop and engine, largest difference of a KL (nats); all answers are the same", worst, f"<= {AGREE}"),
    ]
