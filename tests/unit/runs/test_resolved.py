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


ROWS = [{"text": f"w{i}", "label": "red" if i else "blue"} for i in range(12)]


@pytest.mark.parametrize(
    ("rows", "override", "mode", "message"),
    [
        (ROWS, "data.shots=2", "oracle_span", r"sample row-00001: oracle_span needs a shot or text that holds the answer"),
        ([*ROWS, {"text": "w", "label": "blue"}], "data.balance=true", "oracle_span", None),
        (ROWS, "data.shots=2", "whole_shots", None),
        (ROWS, "data.shots=2", "transfer_span", None),
        ([{"context": f"c{i} red", "question": "q", "answer": "red"} for i in range(3)], "seed=1", "oracle_span", None),
        (
            [{"context": f"c{i}", "question": "q", "answer": "red"} for i in range(3)],
            "seed=1",
            "oracle_span",
            "holds the answer",
        ),
        ([{"context": "c", "question": "q", "answer": "a"}], "seed=1", "whole_shots", "whole_shots needs solved examples"),
        ([{"context": "c", "question": "q", "answer": "a"}], "seed=1", "transfer_span", "transfer_span needs another question"),
    ],
)
def test_a_selector_that_needs_more_than_rows_have(
    rows: list[dict[str, str]], override: str, mode: str, message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(rows))
    config = resolve(None, [f"data.on_path='{path}'", "eval.on_samples=20", override, f"select.mode={mode}"])
    if message is None:
        assert len(resolve_run("phase2", config).conditions) == 1
        return
    with pytest.raises(DataError, match=message):
        resolve_run("phase2", config)


def test_a_selector_that_needs_more_than_a_task_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cedkv.tasks.symbol_lookup.SymbolLookup.gives", frozenset({"shots"}), raising=False)
    config = resolve(None, ["select.mode=oracle_span"])
    with pytest.raises(DataError, match=r"^oracle_span needs gold, which not every episode of data\.task = symbol_lookup has"):
        resolve_run("phase2", config)
    picked = resolve(None, ["select.mode=oracle_span", "data.sample_ids=[on-42-00000]"])
    with pytest.raises(DataError, match=r"^oracle_span needs gold"):
        resolve_run("phase2", picked)
    assert resolve_run("phase2", resolve(None, ["select.mode=whole_shots"])).conditions
