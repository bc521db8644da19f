"""How many rows go through the model at once: rows of like length share a pass, and a pass that does not fit is halved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from cedkv.core.errors import ModelError

T = TypeVar("T")
TOKENS = {"cpu": 512, "mps": 8192, "cuda": 16_384}
"""Tokens of an automatic pass, padding included, by device: enough to fill it.

More is slower on a CPU (seen: a fifth from 400 to 1,600): activations beyond the allocator's largest block are mapped anew
for every operation, and leave the processor's cache.
"""
SLACK = 1.25
"""A pass may be this much larger where that takes all the rest: a few rows of their own would cost nearly as much again."""
_log = logging.getLogger(__name__)


class Batching:
    """The size of a pass: ``rows`` at most where the user says so, else as many as fit ``tokens``, one at least.

    When memory runs out the size is halved for the rest of the run, with a warning: results do not depend on it beyond the
    numerical floor.
    """

    def __init__(self, rows: int | None, device: torch.device) -> None:
        self.rows = rows
        self.tokens = TOKENS[device.type]
        self.slack = SLACK

    def passes(self, lengths: Sequence[int], compute: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
        """Compute all rows, in passes of like length; within a pass they keep their order, so that what belongs to them need
        not be picked out where all of them fit.

        Args:
            lengths: tokens of each row.
            compute: takes the indices of a pass's rows.

        Yields:
            The indices of a pass, and what ``compute`` made of them.

        Raises:
            ModelError: not even one row fits into memory.
        """
        waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
        while waiting:
            part = sorted(waiting[: self._fitting([lengths[i] for i in waiting])])
            try:
                found = compute(part)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self._back_off(len(part), max(lengths[i] for i in part), str(error))
                continue
            del waiting[: len(part)]
            yield part, found

    def _fitting(self, lengths: Sequence[int]) -> int:
        """How many of these rows, ascending by length, make the next pass."""
        if self.rows is not None:
            return self.rows
        if len(lengths) * lengths[-1] <= self.slack * self.tokens:
            return len(lengths)
        return max(1, sum((i + 1) * length <= self.tokens for i, length in enumerate(lengths)))

    def _back_off(self, rows: int, width: int, reason: str) -> None:
        if rows == 1:
            raise ModelError(
                f"memory ran out in a pass of a single row of {width} tokens: {reason.splitlines()[0][:200]}; shorten the "
                "text, use a smaller model or dtype, or a device with more memory"
            )
        if self.rows is not None:
            self.rows = rows // 2
        self.tokens, self.slack = rows // 2 * width, 1.0  # what is found to fit is not gone beyond
        _log.warning("memory ran out in a pass of %d rows of %d tokens: going on with %d rows", rows, width, rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("not enough memory", "can't allocate memory", "out of memory")
    )
