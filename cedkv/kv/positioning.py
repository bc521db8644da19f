"""Where kept tokens and the query go: positions and slots as functions from integers to integers.

A null slot takes a slot of the prefix and no position. Positions are rotary positions; BOS, where there is one, is kept
token 0 and so gets position 0 in both modes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cedkv.core.errors import ConfigError
from cedkv.core.values import Placement


def compact(kept: Sequence[int], demo_length: int) -> tuple[tuple[int, ...], int]:
    """Kept tokens at 0..K-1, the query from K on."""
    return tuple(range(len(kept))), len(kept)


def absolute(kept: Sequence[int], demo_length: int) -> tuple[tuple[int, ...], int]:
    """Kept tokens where they were in the demo, the query from L on: as far away as the teacher sees it."""
    return tuple(kept), demo_length


def null_pad(n_kept: int, prefix_len: int) -> int:
    """All ``prefix_len`` slots; those beyond the kept tokens hold zeros and are masked out."""
    return prefix_len


def shrink_to_selected(n_kept: int, prefix_len: int) -> int:
    """A slot for each kept token and no more."""
    return n_kept


POSITIONING: dict[str, Callable[[Sequence[int], int], tuple[tuple[int, ...], int]]] = {
    "compact": compact,
    "absolute": absolute,
}
PADDING: dict[str, Callable[[int, int], int]] = {"null_pad": null_pad, "shrink_to_selected": shrink_to_selected}


def place(kept: Sequence[int], demo_length: int, positioning: str, padding: str, prefix_len: int) -> Placement:
    """Positions of the kept tokens and of the query's first token, and the number of slots.

    Args:
        kept: ascending demo indices, without repeats, each below ``demo_length``.

    Raises:
        ConfigError: more kept tokens than ``prefix_len``.
    """
    if len(kept) > prefix_len:
        raise ConfigError(
            f"{len(kept)} kept tokens cannot fit prefix_len = {prefix_len}: the prefix would lose tokens; raise "
            f"prefix_len to {len(kept)}, or lower span_budget, span_len or keep_sink"
        )
    key_positions, query_start = POSITIONING[positioning](kept, demo_length)
    return Placement(tuple(kept), key_positions, query_start, PADDING[padding](len(kept), prefix_len))
