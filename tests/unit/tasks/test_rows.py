"""Files of rows: the format is told by what is in them, and what cannot be read is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cedkv.core.errors import DataError
from cedkv.tasks import rows
from cedkv.tasks.rows import Rows, read_documents, read_rows

DATA = [{"text": "one, two", "label": 0}, {"text": 'a "quote"', "label": 1}, {"text": "three\nlines", "label": 0}]
WORDS = [{"text": each["text"], "label": str(each["label"])} for each in DATA]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in DATA)
CSV = 'text,label\n"one, two",0\n"a ""quote""",1\n"three\nlines",0\n'


def read(path: Path, content: str | bytes | None = None) -> Rows:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(str(path), "data.on_path")


def values(path: Path, content: str | bytes | None = None) -> list[dict[str, Any]]:
    return [row.values for row in read(path, content).rows]


@pytest.mark.parametrize("name", ["own.jsonl", "own.txt", "own.json", "own", "own.JSONL.gz"])
@pytest.mark.parametrize(
    "content",
    [
        JSON_LINES, "\ufeff" + JSON_LINES, JSON_LINES.replace("\n", "\r\n"), JSON_LINES + "\n  \n", json.dumps(DATA),
        json.dumps(DATA, indent=1), json.dumps({"version": 2, "data": DATA, "tags": ["x"]}),
        json.dumps({"name": "x", "examples": DATA}, indent=2),
    ],
    ids=["lines", "bom", "crlf", "end", "list", "indented", "container", "container_indented"],
)  # fmt: skip
def test_json_of_any_shape_under_any_name(tmp_path: Path, name: str, content: str) -> None:
    assert values(tmp_path / name, content) == DATA
    assert values(tmp_path / name, gzip.compress(content.encode())) == DATA


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["own.csv", "own.data", "own.csv.gz"])
def test_tables(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    pd.DataFrame(DATA).to_csv(path, sep=delimiter, index=False, encoding="utf-8-sig")
    assert values(path) == WORDS
    assert [row.place for row in read(path).rows] == [f"{path}:{line}" for line in (2, 3, 4)]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "own.anything"
    pd.DataFrame({**pd.DataFrame(DATA), "nothing": [None, 1.5, None]}).to_parquet(path)
    assert values(path) == [{**row, "nothing": number} for row, number in zip(DATA, (None, 1.5, None), strict=True)]
    assert read(path).rows[1].place == f"{path}: row 2"


def test_parquet_knows_the_words_of_its_labels(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "own.parquet"
    features = {"text": {"_type": "Value"}, "label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    table = pa.Table.from_pylist(DATA).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    assert read(path).words == {"label": ("bad", "good")}


def test_a_first_line_with_a_number_is_no_header(tmp_path: Path) -> None:
    assert values(tmp_path / "own.csv", "3,Oil falls\n1,War ends\n") == [
        {"1": "3", "2": "Oil falls"},
        {"1": "1", "2": "War ends"},
    ]


def test_empty_fields_and_nameless_columns(tmp_path: Path) -> None:
    """pandas writes its index under no name."""
    assert values(tmp_path / "own.csv", ",text\n0,a\n\n1,\n") == [
        {"column 1": "0", "text": "a"},
        {"column 1": "1", "text": None},
    ]


def test_quotes_in_a_file_with_tabs_may_be_none(tmp_path: Path) -> None:
    content = 'label\ttext\nham\t"so he said\nspam\tsay "yes"\n'
    expected = [{"label": "ham", "text": '"so he said'}, {"label": "spam", "text": 'say "yes"'}]
    assert values(tmp_path / "own.tsv", content) == expected
    assert values(tmp_path / "quoted.tsv", 'label\ttext\nham\t"a\tb"\n') == [{"label": "ham", "text": "a\tb"}]


def test_rows_may_be_lists(tmp_path: Path) -> None:
    assert values(tmp_path / "own.json", '[["hot", "cold"], ["big", "small"]]')[1] == {"1": "big", "2": "small"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "text,label\na,b\na,b,c\n", r"a\.csv:3: 3 fields where the first line has 2"),
        ("a.csv", 'text,label\n"a\nb",c\nd\n', r"a\.csv:4: 1 fields where"),
        ("a.csv", 'text,label\na,"b\n', r"a\.csv:2: not readable as CSV with the delimiter ',': unexpected end of data"),
        ("a.csv", 'text,label\n"a"b,c\n', r"a\.csv:2: not readable as CSV"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: two columns are named 'text'"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', r"a\.jsonl:2: empty line"),
        ("a.jsonl", '{"a": 1}\n{"a": NaN}\n', r"a\.jsonl:2: not a JSON object: NaN is not JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"a\.jsonl:2: not a JSON object: key 'a' appears twice"),
        ("a.jsonl", '{"a": 1}\n7\n', r"a\.jsonl:2: a row should be an object, found 7"),
        ("a.jsonl", "not JSON\n", r"a\.jsonl:1: not a JSON object"),
        ("a.json", '[{"a": 1},\n {"a": 1, "a": 2}]', "not JSON: key 'a' appears twice"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2: not JSON"),
        ("a.json", '[{"a": 1}, 3]', r"a\.json: row 2: a row should be an object, found 3"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.csv", b"text\xff\n", "it is not UTF-8"),
        ("a.csv", b"\xff\xfet\0e\0", "it is not UTF-8"),
        ("a.csv", b"PK\x03\x04\0\0\0", "it is not text"),
        ("a.parquet", b"PAR1 nothing more", "it is a damaged Parquet file"),
        ("a.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0)[:-12], "it is a damaged gzip file"),
        ("a.jsonl.gz", b"\x1f\x8bno", "it is a damaged gzip file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, content)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(
            DataError, match=r"^data\.on_path = .* cannot be read: .*; give the path of a JSONL, JSON, CSV or Parq"
        ):
            read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_long_line_is_not_read_into_memory(tmp_path: Path, name: str) -> None:
    line = ('{"a": "' if "json" in name else "a,b\n") + "x" * (rows.MAX_LINE + 1)
    content = gzip.compress(line.encode()) if name.endswith(".gz") else line.encode()
    with pytest.raises(DataError, match="more than 10,000,000 characters; write one row on every line"):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", JSON_LINES * 9), ("a.json", json.dumps(DATA * 9)), ("a.csv", "text,label\n" + "a,b\n" * 99)],
)
def test_a_file_that_unpacks_to_too_much(tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_TEXT", 300)
    with pytest.raises(DataError, match="more than 300 characters"):
        read(tmp_path / name, gzip.compress(content.encode()))


def test_rows_behind_the_limit_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROWS", 2)
    own = read_rows(str(tmp_path / "a"), "data.on_path", lambda _: 2) if (tmp_path / "a").write_text(JSON_LINES) else None
    assert own is not None
    assert (len(own.rows), own.cut) == (2, True)
    assert not read(tmp_path / "b", '{"a": 1}\n{"a": 2}\n').cut


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(JSON_LINES + "not JSON\n")
    assert len(read_rows(str(tmp_path / "a"), "data.on_path", lambda first: 2 if "text" in first.values else 9).rows) == 2


def documents(path: Path, content: str, n: int = 9) -> list[tuple[str, str]]:
    path.write_text(content)
    return [(place.removeprefix(f"{path}:"), text) for place, text in read_documents(str(path), "data.off_path", n)]


def test_documents(tmp_path: Path) -> None:
    """They are separated by blank lines; where there are none, each line is one."""
    path = tmp_path / "a.txt"
    assert documents(path, "\none\ntwo\n\n \nthree\n") == [("2", "one\ntwo"), ("6", "three")]
    assert documents(path, "one\ntwo\nthree") == [("1", "one"), ("2", "two"), ("3", "three")]
    assert documents(path, "one\ntwo\nthree", 2) == [("1", "one"), ("2", "two")]
    assert documents(path, "one\n\ntwo\n\nthree", 2) == [("1", "one"), ("3", "two")]
    for content in ("", " \n\n"):
        with pytest.raises(DataError, match=r"no text, where data\.off_path needs documents"):
            documents(path, content)
