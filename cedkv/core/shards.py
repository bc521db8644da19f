"""Shards: the parts into which the units of one run are divided, each computed as a run of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
MAX_SHARDS = 9999
_SHARD = re.compile(r"(0|[1-9]\d{0,8})/(0|[1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True, order=True)
class Shard:
    """Shard ``index`` of ``count``, counted from 1: every ``count``-th unit, from number ``index`` on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that a text like ``1/4`` names.

        Raises:
            ValueError: it names none; the message says why.
        """
        match = _SHARD.fullmatch(text)
        if match is None:
            raise ValueError("a shard is i/n, as 1/4: the first of four parts of the run's units")
        index, count = map(int, match.groups())
        if not 1 <= count <= MAX_SHARDS:
            raise ValueError(f"a run is divided into {count} shards, from 1 to {MAX_SHARDS:,} are possible; give i/n, as 1/4")
        if not 1 <= index <= count:
            raise ValueError(f"there is no shard {index} of {count}: shards are counted from 1, 1/{count} to {count}/{count}")
        return cls(index, count)

    def of(self, units: Sequence[T]) -> Sequence[T]:
        """Return the units of this shard, in their order; none where there are fewer units than shards."""
        return units[self.index - 1 :: self.count]
