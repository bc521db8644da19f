"""OFF prompts of a user's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedkv.core.errors import DataError
from cedkv.tasks.load import load_samples
from cedkv.tasks.texts import read_sample_texts
from tests.support import tiny


@pytest.mark.parametrize(
    ("name", "content", "overrides", "expected"),
    [
        ("a.jsonl", '{"prompt_text": "Why?"}\n', (), [("off-00001", "Why?", False)]),
        ("a.jsonl", '{"prompt_text": "Why?"}\n', ("data.off_format=document",), [("off-00001", "Why?", True)]),
        ("a.csv", "id,Question\nx,Why?\ny,How?\n", (), [("x", "Why?", False), ("y", "How?", False)]),
        ("a.json", '[{"text": "1."}, {"text": "2."}]', (), [("off-00001", "1.", True), ("off-00002", "2.", True)]),
        ("a.json", '[{"text": "Once."}]', ("data.off_format=prompt",), [("off-00001", "Once.", False)]),
        ("a.txt", "One\ndocument.\n\nAnother.", (), [("off-00001", "One\ndocument.", True), ("off-00002", "Another.", True)]),
        ("a.txt", "Why?\nHow?\n", ("data.off_format=prompt",), [("off-00001", "Why?", False), ("off-00002", "How?", False)]),
        ("a.txt", '{"prompt_text": "Why?"}\n', (), [("off-00001", "Why?", False)]),
        ("a.json", '[{"text": ""}, {"text": "Twice."}]', ("data.unusable=skip",), [("off-00002", "Twice.", True)]),
    ],
)  # fmt: skip
def test_off_prompts(tmp_path: Path, name: str, content: str, overrides: tuple[str, ...], expected: list[Any]) -> None:
    (tmp_path / name).write_text(content)
    texts = read_sample_texts(tiny.config("nowhere", f"data.off_path='{tmp_path}/{name}'", *overrides)).off
    assert [(text.sample_id, text.text, text.document) for text in texts] == expected


def test_off_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\nx,y\n")
    with pytest.raises(DataError, match=r"no column of OFF prompts; found \['a', 'b'\]\. Name one prompt, question"):
        load_samples(tiny.config("nowhere", f"data.off_path={tmp_path}/a.csv"), tiny.tokenizer(), 1024, 500)
    (tmp_path / "b.csv").write_text("prompt,b\n,y\nx,y\n")
    with pytest.raises(DataError, match=r"b\.csv:2: prompt is empty; fill it in"):
        load_samples(tiny.config("nowhere", f"data.off_path={tmp_path}/b.csv"), tiny.tokenizer(), 1024, 500)
