"""null_pad and shrink_to_selected: other shapes, the same figures, in the whole engine."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from cedkv.kv.positioning import place
from tests.support import tiny


def test_null_pad_fills_to_prefix_len_and_takes_no_position() -> None:
    null, shrunk = (place((2, 3, 7), 20, "compact", padding, 64) for padding in ("null_pad", "shrink_to_selected"))
    assert (null.slots, shrunk.slots) == (64, 3)
    assert null.key_positions == shrunk.key_positions == (0, 1, 2)
    assert null.query_start == shrunk.query_start == 3


@pytest.mark.parametrize(("kv_source", "positioning"), product(("prefill", "gather"), ("compact", "absolute")))
def test_both_paddings_give_the_same_figures(model_folder: Path, kv_source: str, positioning: str) -> None:
    settings = (f"prefix.kv_source={kv_source}", f"injection.positioning_mode={positioning}")
    null, shrunk = (
        tiny.records(model_folder, f"prefix.padding_mode={padding}", *settings)
        for padding in ("null_pad", "shrink_to_selected")
    )
    compared = 0
    for left, right in zip(null, shrunk, strict=True):
        if left["type"] != "sample":
            continue
        for name, value in left.items():
            if isinstance(value, float):
                assert value == pytest.approx(right[name], rel=1e-4, abs=1e-4), (left["sample_id"], name)
                compared += 1
            elif name.startswith("token"):
                assert value == right[name]
    assert compared > 6 * 10


def test_recorded_slots_say_which_padding_it_was(model_folder: Path) -> None:
    for padding, expected in (("null_pad", {24}), ("shrink_to_selected", {12})):
        found = [r for r in tiny.records(model_folder, f"prefix.padding_mode={padding}") if r["type"] == "selection"]
        assert {record["prefix_slots"] for record in found} == expected
        json.dumps(found, allow_nan=False)
