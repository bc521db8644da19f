"""How many rows go through the model at once: rows of similar length share a pass; a pass that does not fit is halved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from cedkv.core.errors import ModelError
from cedkv.core.text import one_line

T = TypeVar("T")
PASS_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 16_384}
"""Tokens per automatic pass, padding included, by device: enough to keep the device busy.

On CPUs (two cores, with AVX2 and with AVX-512, 135M parameters) passes of 1,024 tokens are a tenth faster a token than passes
of 512, and larger ones hardly faster. As many rows as fit are also few different shapes: oneDNN keeps code for each, which
grew a process by 100 MB within 1,000 samples where passes were divided to have the least padding.
"""
LAST_PASS_SLACK = 1.25
"""A pass may be larger by this factor if it then takes all remaining rows: a pass of a few rows costs nearly as much again."""
_log = logging.getLogger(__name__)


class Batching:
    """The size of a pass: at most ``max_rows`` rows where the user sets it, else as many as fit ``max_tokens``, at least one.

    When memory runs out, the size is halved for the rest of the run, with a warning. Results do not depend on the size beyond
    the numerical floor; ``halved`` says what it has become, under the names that a unit is recorded with, and nothing before.
    """

    def __init__(self, max_rows: int | None, device: torch.device) -> None:
        self.max_rows = max_rows
        self.max_tokens = PASS_TOKENS[device.type]
        self.slack = LAST_PASS_SLACK
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
        while pending:
            indices = sorted(pending[: self._next([lengths[i] for i in pending])])
            try:
                result = compute(indices)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(indices), max(lengths[i] for i in indices), str(error))
                continue
            del pending[: len(indices)]
            yield indices, result

    def fitting(self, length: int) -> int:
        """Return how many rows of so many tokens fit a pass, one at least."""
        return max(1, self.max_tokens // max(1, length)) if self.max_rows is None else self.max_rows

    def _next(self, lengths: Sequence[int]) -> int:
        """Return how many of these rows, in ascending order of length, form the next pass."""
        if self.max_rows is not None:
            return self.max_rows
        if len(lengths) * lengths[-1] <= self.slack * self.max_tokens:
            return len(lengths)
        return max(1, sum((i + 1) * length <= self.max_tokens for i, length in enumerate(lengths)))

    def _halve(self, rows: int, width: int, reason: str) -> None:
        if rows == 1:
            raise ModelError(
                f"memory ran out in a pass of a single row of {width} tokens: {one_line(reason.splitlines()[0])}; shorten the "
                "text, use a smaller model or dtype, or a device with more memory"
            )
        if self.max_rows is not None:
            self.max_rows = rows // 2
        self.max_tokens, self.slack = rows // 2 * width, 1.0  # no slack: a pass beyond the size that fits runs out again
        self.halved = {"runtime.halved_rows": rows // 2, "runtime.halved_tokens": self.max_tokens}
        _log.warning("memory ran out in a pass of %d rows of %d tokens: continuing with %d rows", rows, width, rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, of a card or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in ("not enough memory", "can't allocate memory", "out of memory")
    )
