"""The table of OFF prompts: base's own answer as text, and how far it moves."""

from __future__ import annotations

import pytest

from cedkv.report.tables import off_table, off_tokens
from tests.support import making

TOKENS = {"token_base": 2, "token_select": 9, "prompt_text": "p", "state_of": "on-0"}


def test_off_prompts_have_base_s_answer_and_how_far_it_moves() -> None:
    off = [
        making.off(**TOKENS, **making.further(0.5, 0.25, 0.0, entropy=1.5, changed=[0, 2])),
        making.off(**TOKENS, **making.further(entropy=2.5)),
    ]
    table = off_table(off, lambda token: f"<{token}>")
    assert list(table["token_base"]) == ["<2>", "<2>"]
    assert list(table["base_entropy"]) == [1.5, 2.5]
    assert table["base_answer"][0] == "<2><3><4>"
    assert table["further_kl_mean"][0] == pytest.approx(0.25)
    assert table["further_changed"][0] == 2
    assert table["base_answer"].isna()[1]
    assert list(off_tokens(off)) == [2, 9, 2, 3, 4, 2, 9]


def test_older_records_have_no_such_columns() -> None:
    table = off_table([making.off(**TOKENS)], str)
    assert list(table.columns) == [
        *("sample_id", "phase2_delta_off_select", "prompt_text", "state_of", "same_token", "token_base", "token_select")
    ]
    assert list(off_tokens([making.off(**TOKENS)])) == [2, 9]
