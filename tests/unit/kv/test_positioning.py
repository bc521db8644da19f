"""Positions and slots as integers: what every mode keeps, and each mode by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.config.extensions import PADDING, POSITIONING
from cedkv.core.errors import ConfigError
from cedkv.kv.positioning import place

MODES = pytest.mark.parametrize(("positioning", "padding"), [(a, b) for a in POSITIONING.builtin for b in PADDING.builtin])


def test_compact_by_hand() -> None:
    assert POSITIONING.get("compact")([0, 4, 5, 9], 12) == ((0, 1, 2, 3), 4)


def test_absolute_by_hand() -> None:
    """The query starts behind the whole demo, not behind the last kept token: as far away as the teacher sees it."""
    assert POSITIONING.get("absolute")([0, 4, 5, 9], 12) == ((0, 4, 5, 9), 12)


def test_padding_by_hand() -> None:
    assert PADDING.get("null_pad")(5, 64) == 64
    assert PADDING.get("shrink_to_selected")(5, 64) == 5


@MODES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(kept=st.sets(st.integers(0, 39), min_size=1, max_size=16), demo=st.integers(40, 60), extra=st.integers(0, 9))
def test_every_mode_keeps_the_rules(positioning: str, padding: str, kept: set[int], demo: int, extra: int) -> None:
    tokens = sorted(kept)
    placed = place(tokens, demo, positioning, padding, len(tokens) + extra)
    positions = placed.key_positions
    assert placed.kept_tokens == tuple(tokens)
    assert len(positions) == len(tokens)
    assert list(positions) == sorted(set(positions))
    assert positions[0] >= 0
    assert positions[-1] < placed.query_start <= demo
    assert len(tokens) <= placed.slots <= len(tokens) + extra
    if 0 in kept:
        assert positions[0] == 0


@MODES
def test_null_slots_take_no_position(positioning: str, padding: str) -> None:
    """Slots that move the query would change its distance to the kept keys with every prefix_len."""
    near, far = (place([1, 2, 7], 10, positioning, padding, length) for length in (3, 64))
    assert (near.key_positions, near.query_start) == (far.key_positions, far.query_start)


@pytest.mark.parametrize("padding", PADDING.builtin)
def test_everything_kept_is_the_same_in_all_modes(padding: str) -> None:
    """And it is the teacher's own placement, which Gate A's keep_all_absolute relies on."""
    placed = {place(range(9), 9, positioning, padding, 12) for positioning in POSITIONING.builtin}
    assert len(placed) == 1
    assert (placed.pop().key_positions) == tuple(range(9))


@MODES
def test_more_tokens_than_slots(positioning: str, padding: str) -> None:
    assert place(range(5), 9, positioning, padding, 5).slots == 5
    with pytest.raises(ConfigError, match=r"^5 kept tokens cannot fit prefix_len = 4: .*; raise prefix_len to 5, or lower"):
        place(range(5), 9, positioning, padding, 4)
