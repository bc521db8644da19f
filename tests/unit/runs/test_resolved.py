"""A run's input is read and checked before a run is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cedkv.config.resolve import resolve
from cedkv.core.errors import DataError
from cedkv.runs.resolved import resolve_run

LINE = {"demo_text": "Word: dax\nSymbol: red\n\n", "query_text": "Word: dax\nSymbol:", "answer_text": " red"}


@pytest.mark.parametrize(
    ("field", "value", "mode"),
    [("gold", [18, 21], "oracle_span"), ("other_query_text", "Word: lug\nSymbol:", "transfer_span")],
)
def test_a_selector_that_needs_more_than_the_users_samples_have(
    field: str, value: object, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lists = {"select_modes": f"attention_diversity_span,{mode}"}
    config = resolve(None, ["data.on_path=on.jsonl", "eval.on_samples=1"])
    Path("on.jsonl").write_text(json.dumps(LINE) + "\n")
    with pytest.raises(DataError, match=rf'sample .*: {mode} needs "{field}" in every line of data\.on_path'):
        resolve_run("ablate_selector", config, "2", lists)
    assert not Path("outputs").exists()
    Path("on.jsonl").write_text(json.dumps({**LINE, field: value}) + "\n")
    assert len(resolve_run("ablate_selector", config, "2", lists).conditions) == 2
