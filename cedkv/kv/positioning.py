"""Where kept tokens and the query go: positions and slots as pure functions from integers to integers.

A null slot takes a slot of the prefix and no position. Positions are rotary positions; BOS, where there is one, is kept
token 0 and so gets position 0 in both built-in modes.
"""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.config.extensions import KV_SOURCES, PADDING, POSITIONING
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview
from cedkv.core.values import Placement


def compact(kept: Sequence[int], demo_length: int) -> tuple[tuple[int, ...], int]:
    """Place kept tokens at 0..K-1 and the query from K on."""
    return tuple(range(len(kept))), len(kept)


def absolute(kept: Sequence[int], demo_length: int) -> tuple[tuple[int, ...], int]:
    """Leave kept tokens where they were in the demo, the query from L on: as far away as the teacher sees it."""
    return tuple(kept), demo_length


def null_pad(n_kept: int, prefix_len: int) -> int:
    """Give all ``prefix_len`` slots; those beyond the kept tokens hold zeros and are masked out."""
    return prefix_len


def shrink_to_selected(n_kept: int, prefix_len: int) -> int:
    """Give a slot to each kept token and no more."""
    return n_kept


def moves_keys(positioning: str) -> bool:
    """Return whether kept tokens may get other positions than they have in the demo: in every mode but ``absolute``."""
    return positioning != "absolute"


def moves_cached_keys(kv_source: str, positioning: str) -> bool:
    """Return whether keys from a demo's cache get other positions, which only a known rotation can do."""
    return bool(KV_SOURCES.get(kv_source).reads_demo_cache and moves_keys(positioning))


def place(kept: Sequence[int], demo_length: int, positioning: str, padding: str, prefix_len: int) -> Placement:
    """Return the positions of the kept tokens and of the query's first token, and the number of slots.

    Args:
        kept: ascending demo indices, without repeats, each below ``demo_length``.
        positioning, padding: names of registered modes.

    Raises:
        ConfigError: more kept tokens than ``prefix_len``, or a mode of another package that gives impossible positions or
            slots.
    """
    if len(kept) > prefix_len:
        raise ConfigError(
            f"{len(kept)} kept tokens cannot fit prefix_len = {prefix_len}: the prefix would lose tokens; raise "
            f"prefix_len to {len(kept)}, or lower span_budget, span_len or keep_sink"
        )
    with POSITIONING.errors_named(positioning):
        key_positions, query_start = POSITIONING.get(positioning)(kept, demo_length)
    with PADDING.errors_named(padding):
        slots = PADDING.get(padding)(len(kept), prefix_len)
    if positioning not in POSITIONING.builtin or padding not in PADDING.builtin:
        _check_modes(kept, key_positions, query_start, slots, positioning, padding)
    return Placement(tuple(kept), tuple(key_positions), query_start, slots)


def _check_modes(
    kept: Sequence[int], key_positions: Sequence[int], query_start: int, slots: int, positioning: str, padding: str
) -> None:
    """Reject what no prefix can have; Gate A holds the built-in modes to more than this."""
    ascending = all(0 <= before < after for before, after in zip(key_positions, [*key_positions[1:], query_start], strict=True))
    if len(key_positions) != len(kept) or not ascending:
        raise ConfigError(
            f"positioning mode {positioning!r} gives {len(kept)} kept tokens {len(key_positions)} positions, "
            f"{preview(list(key_positions))}, and the query {query_start}: positions must ascend from 0 or more, one per kept "
            "token, the query behind them"
        )
    if slots < len(kept):
        raise ConfigError(f"padding mode {padding!r} gives {slots} slots to {len(kept)} kept tokens; give at least those")
