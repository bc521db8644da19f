"""Files of a run: valid JSON for every strict reader, and never half-written."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.core.files import SCHEMA_VERSION, append_lines, atomic_write, clean, write_json, write_shared_text, write_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def strict(text: str) -> Any:
    """As JSON.parse reads: Python's own reader takes NaN without a word."""

    def reject(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=reject)


def same(left: Any, right: Any) -> bool:
    """Equal, with lists for tuples and None for what is not finite."""
    if isinstance(left, float) and not math.isfinite(left):
        return right is None
    if isinstance(left, list | tuple):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


@settings(max_examples=100, deadline=None, derandomize=True)
@given(value=VALUES)
def test_clean_changes_nothing_but_what_is_not_finite(value: Any) -> None:
    assert same(value, clean(value))
    assert same(value, strict(json.dumps(clean(value), allow_nan=False)))


def test_object_is_strict_json_with_its_version_first(tmp_path: Path) -> None:
    content = {"a": [math.nan, {"b": math.inf}], "c": (1, np.float64("nan")), "d": "ü · –", "e": -0.5}
    write_json(tmp_path / "new/report.json", content)
    text = (tmp_path / "new/report.json").read_text(encoding="utf-8")
    assert list(strict(text)) == ["schema_version", "a", "c", "d", "e"]
    assert strict(text) == {"schema_version": SCHEMA_VERSION, "a": [None, {"b": None}], "c": [1, None], "d": "ü · –", "e": -0.5}
    assert "ü · –" in text
    assert text.endswith("}\n")


def test_write_leaves_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one\n")
    write_text(tmp_path / "a.txt", "two\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two\n"


def test_two_processes_that_write_the_same_file_both_end_well(tmp_path: Path) -> None:
    """What is measured on a model is kept where others measure too."""
    path = tmp_path / "certificate.json"
    with atomic_write(path, ".first") as file:
        file.write("one of them\n")
        write_shared_text(path, "the other\n")
        assert path.read_text() == "the other\n"
    assert path.read_text() == "one of them\n"
    write_shared_text(path, "again\n")
    assert [each.name for each in tmp_path.iterdir()] == ["certificate.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_crash_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A report that is cut in half looks like a report."""
    path = tmp_path / "report.json"
    write_json(path, {"verdict": "old"})

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), fails)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"verdict": "new", "padding": "x" * 100_000})
    assert strict(path.read_text())["verdict"] == "old"


def test_value_that_is_no_json_fails_before_the_file_is_touched(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"a": object()})
    assert strict((tmp_path / "report.json").read_text())["a"] == 1


def test_lines_are_appended_each_an_object(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [{"a": math.nan}, {"a": "line\nbreak \u2028"}])
    append_lines(path, [{"a": 3}])
    append_lines(path, [])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [strict(line)["a"] for line in lines] == [None, "line\nbreak \u2028", 3]
    assert all(strict(line)["schema_version"] == SCHEMA_VERSION for line in lines)


def test_lines_are_on_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a run that crashes later are kept: flushed to the disk, not only to a buffer."""
    synced: list[str] = []
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_text()))
    append_lines(path, [{"a": 1}, {"a": 2}])
    assert [len(text.splitlines()) for text in synced] == [2]
