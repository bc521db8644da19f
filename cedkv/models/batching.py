"""How many rows go through the model at once: rows of similar length share a pass; a pass that does not fit is halved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from cedkv.core.errors import ModelError
from cedkv.core.text import one_line

T = TypeVar("T")
PASS_TOKENS = {"cpu": 1280, "mps": 8192, "cuda": 16_384}
"""Tokens per automatic pass at most, padding included, by device: enough to keep the device busy.

On CPUs (two cores, with AVX2 and with AVX-512, 135M parameters) passes of 1,024 tokens are a tenth faster a token than passes
of 512, and larger ones as fast.
"""
PASS_COST = {"cpu": 32, "mps": 512, "cuda": 2048}
"""What a pass costs besides its tokens, in tokens, by device: reading the weights, starting kernels, waiting for threads.

Measured: 40 on a CPU (135M parameters); on an H200 600 for a model of 8B's sizes, 12,000 for 135M.
"""
_log = logging.getLogger(__name__)


class Batching:
    """The size of a pass: at most ``max_rows`` rows where the user sets it, else at most ``max_tokens`` tokens or one row.

    Passes then are those that cost the least: every pass its padded tokens, and ``PASS_COST``.

    When memory runs out, the size is halved for the rest of the run, with a warning. Results do not depend on the size beyond
    the numerical floor; ``halved`` says what it has become, under the names that a unit is recorded with, and nothing before.
    """

    def __init__(self, max_rows: int | None, device: torch.device) -> None:
        self.max_rows = max_rows
        self.max_tokens = PASS_TOKENS[device.type]
        self.pass_cost = PASS_COST[device.type]
        self.halved: dict[str, int] = {}

    def passes(self, lengths: Sequence[int], compute: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
        """Compute all rows, in passes of similar length.

        Rows keep their order within a pass, so that nothing has to be reordered where all rows fit one pass.

        Args:
            lengths: tokens per row.
            compute: computes one pass, given the indices of its rows.

        Yields:
            The row indices of a pass, ascending, and the result of ``compute``.

        Raises:
            ModelError: not even a single row fits into memory.
        """
        pending = sorted(range(len(lengths)), key=lengths.__getitem__)
        counts = self._divide([lengths[i] for i in pending])
        while pending:
            indices = sorted(pending[: counts[0]])
            try:
                result = compute(indices)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(indices), max(lengths[i] for i in indices), str(error))
                counts = self._divide([lengths[i] for i in pending])
                continue
            del pending[: len(indices)], counts[0]
            yield indices, result

    def fitting(self, length: int) -> int:
        """Return how many rows of so many tokens fit a pass, one at least."""
        return max(1, self.max_tokens // max(1, length)) if self.max_rows is None else self.max_rows

    def _divide(self, lengths: Sequence[int]) -> list[int]:
        """Return how many of these rows, in ascending order of length, each pass takes.

        The cheapest division: the cost of the first n rows is the least, over all last passes, of that pass's and of the rows
        before it.
        """
        n = len(lengths)
        if self.max_rows is not None:
            return [min(self.max_rows, n - start) for start in range(0, n, self.max_rows)]
        cost, last = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
        for stop, width in enumerate(lengths, 1):
            most = min(stop, self.fitting(width))
            rows = np.arange(most, 0, -1)
            costs = cost[stop - most : stop] + rows * width + self.pass_cost
            best = int(costs.argmin())
            cost[stop], last[stop] = costs[best], rows[best]
        counts = []
        while n:
            counts.append(int(last[n]))
            n -= counts[-1]
        return counts[::-1]

    def _halve(self, rows: int, width: int, reason: str) -> None:
        if rows == 1:
            raise ModelError(
                f"memory ran out in a pass of a single row of {width} tokens: {one_line(reason.splitlines()[0])}; shorten the "
                "text, use a smaller model or dtype, or a device with more memory"
            )
        if self.max_rows is not None:
            self.max_rows = rows // 2
        self.max_tokens = rows // 2 * width
        self.halved = {"runtime.halved_rows": rows // 2, "runtime.halved_tokens": self.max_tokens}
        _log.warning("memory ran out in a pass of %d rows of %d tokens: continuing with %d rows", rows, width, rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, of a card or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in ("not enough memory", "can't allocate memory", "out of memory")
    )
