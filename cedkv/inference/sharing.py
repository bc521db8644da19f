"""Rows that several conditions ask for: each is computed when the first one asks, and kept until the last one has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

import torch

Rows = tuple[torch.Tensor, ...]
"""Tensors whose first dimension counts the same rows: answers, or keys and values of every layer."""


class SharedRows:
    """Rows by key, each of them computed once, and kept in memory as long as it is needed and no longer.

    What will be asked for is announced beforehand, in the order in which it will be asked for.
    """

    def __init__(self) -> None:
        self._uses_left: Counter[Hashable] = Counter()
        self._kept: dict[Hashable, Rows] = {}

    def __len__(self) -> int:
        """Return the number of rows that are kept for a later use."""
        return len(self._kept)

    def expect(self, keys: Iterable[Hashable]) -> list[int]:
        """Announce one ``take`` of these keys; return the indices of those that it will have to compute."""
        fresh = []
        for index, key in enumerate(keys):
            if key not in self._uses_left:
                fresh.append(index)
            self._uses_left[key] += 1
        return fresh

    def take(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Rows]) -> Rows:
        """Return the rows of these keys, in their order.

        Args:
            compute: computes the rows of some of the keys, given their indices, ascending.

        Returns:
            As many tensors as ``compute`` returns. Rows that are smaller than others are padded with zeros at the end.
        """
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in self._kept)
        computed = compute(missing) if missing else ()
        if len(missing) == len(keys):
            rows = computed
        else:
            at = {keys[index]: row for row, index in enumerate(missing)}
            parts = [tuple(t[at[key]] for t in computed) if key in at else self._kept[key] for key in keys]
            rows = tuple(_stack(same) for same in zip(*parts, strict=True))
        self._uses_left.subtract(keys)
        for row, index in enumerate(missing):
            if self._uses_left[keys[index]] > 0:
                self._kept[keys[index]] = tuple(tensor[row].clone() for tensor in computed)
        for key in first:
            if self._uses_left[key] <= 0:
                self._kept.pop(key, None)
        return rows


def _stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors of one rank, each padded with zeros to the largest size in every dimension."""
    stacked = rows[0].new_zeros(len(rows), *(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)))
    for index, row in enumerate(rows):
        stacked[index][tuple(slice(size) for size in row.shape)] = row
    return stacked


def neighbours_first(wanted: Sequence[Collection[Hashable]]) -> list[int]:
    """Return an order of conditions in which those that share most follow each other, so that few rows have to be kept.

    Args:
        wanted: the keys of each condition.
    """
    keys = [frozenset(own) for own in wanted]
    order = [0]
    while len(order) < len(keys):
        left = [index for index in range(len(keys)) if index not in order]
        order.append(max(left, key=lambda index: len(keys[index] & keys[order[-1]])))
    return order
