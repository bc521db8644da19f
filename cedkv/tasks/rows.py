"""Read a user's file into rows: JSON Lines, a JSON list, CSV (these also gzipped) or Parquet; an error names line or row.

The format is told by the content, not by the file's name: a ``.txt`` may hold JSON Lines, and a ``.json`` too.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from cedkv.core.errors import DataError
from cedkv.core.files import open_user_bytes
from cedkv.core.text import one_line, preview
from cedkv.tasks.tables import find_delimiter, read_table

MAX_LINE = 10_000_000
"""Most characters per line; without a limit, a file without line ends would be read into memory as a whole."""
MAX_TEXT = 256_000_000
"""Most characters that are read of a file, unpacked: a small gzip file can hold any number of them."""
MAX_ROWS = 200_000
"""Most rows that are read of a file; those behind them are left out."""
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_HEAD = 65_536


@dataclass(frozen=True)
class Row:
    """A row of a file.

    number: counted from 1. place: where it stands, for messages: ``own.csv:17``. values: column -> value; None where empty.
    """

    number: int
    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    words: column -> the words of its integers, where the file has them (Parquet written by ``datasets``).
    cut: whether the file goes on behind these rows.
    """

    path: str
    rows: tuple[Row, ...]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cut: bool = False

    @cached_property
    def columns(self) -> list[str]:
        """The columns in their order: of the first thousand rows, because rows may differ."""
        return list(dict.fromkeys(name for row in self.rows[:1000] for name in row.values))


def read_rows(path: str, key: str, limit: Callable[[Row], int] = lambda _: MAX_ROWS) -> Rows:
    """Return the rows of a file.

    Args:
        key: the configuration key that names the file, for messages.
        limit: the most rows that are read, by what the first row is.

    Raises:
        DataError: the file is unreadable, too large, has no row, or has a bad one; the message names file and line.
    """
    with _unreadable(path, key):
        with open_user_bytes(Path(path)) as raw:
            is_parquet = raw.peek(4)[:4] == _PARQUET
            words = _words_of(raw) if is_parquet else {}
            rows, cut = _first(_parquet(raw, path), limit) if is_parquet else ((), False)
        if not is_parquet:
            with _open_text(path) as file:
                rows, cut = _first(_text_rows(file, path), limit)
    if not rows:
        raise DataError(f"{path}: no rows, where {key} needs one or more; write them, or name another file")
    return Rows(path, rows, words, cut)


def _first(rows: Iterator[Row], limit: Callable[[Row], int]) -> tuple[tuple[Row, ...], bool]:
    """Return the first rows, and whether there are more."""
    first = next(rows, None)
    if first is None:
        return (), False
    n = limit(first)
    found = (first, *islice(rows, n - 1))
    try:
        return found, len(found) == n and next(rows, None) is not None
    except (DataError, ValueError):  # what stands behind the rows that are read may be wrong
        return found, True


def read_documents(path: str, key: str, limit: int) -> list[tuple[str, str]]:
    """Return the first documents of a plain text, each with its place.

    Documents are separated by blank lines; where there are none, each line is one. Raises DataError as ``read_rows`` does.
    """
    with _unreadable(path, key), _open_text(path) as file:
        if "\0" in file.read(_HEAD):
            raise ValueError("it is not text")
        file.seek(0)
        blocks, block, start = list[tuple[str, list[str]]](), list[str](), 1
        for number, line in (*_lines(file, path), (0, "")):
            if line.strip():
                start = start if block else number
                block.append(line.strip("\r\n"))
            elif block:
                blocks.append((f"{path}:{start}", block))
                block = []
            if len(blocks) == limit:
                break
    if not blocks:
        raise DataError(f"{path}: no text, where {key} needs documents; write them, or name another file")
    if len(blocks) > 1 or len(blocks[0][1]) == 1:
        return [(place, "\n".join(lines)) for place, lines in blocks]
    (_, lines), start = blocks[0], int(blocks[0][0].rpartition(":")[2])
    return [(f"{path}:{start + i}", line) for i, line in enumerate(lines[:limit])]


def is_document_file(path: str) -> bool:
    """Return whether a file is plain text: by its name, and because it does not begin as JSON does."""
    name = path.lower().removesuffix(".gz")
    if not name.endswith((".txt", ".md", ".text")):
        return False
    try:
        with _open_text(path) as file:
            return file.read(_HEAD).lstrip()[:1] not in ("{", "[")
    except (ValueError, DataError):
        return False  # whoever reads it says why


@contextmanager
def _unreadable(path: str, key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(
            f"{key} = {preview(path, 200)} cannot be read: {error}; give the path of a JSONL, JSON, CSV or Parquet file"
        ) from None


@contextmanager
def _open_text(path: str) -> Iterator[TextIO]:
    """Open a text file, unpacked where it is gzipped; line ends stay as they are. Raises ValueError."""
    with open_user_bytes(Path(path)) as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == _GZIP else raw
        try:
            with io.TextIOWrapper(cast(BinaryIO, unpacked), encoding="utf-8-sig", newline="") as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"it is a damaged gzip file ({error})") from None


def _lines(file: TextIO, path: str) -> Iterator[tuple[int, str]]:
    total = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: more than {MAX_LINE:,} characters; write one row on every line")
        total += len(line)
        if total > MAX_TEXT:
            raise DataError(f"{path}:{number}: more than {MAX_TEXT:,} characters so far; give a smaller file")
        yield number, line


def _text_rows(file: TextIO, path: str) -> Iterator[Row]:
    """Yield the rows of a text file of any format."""
    head = file.read(_HEAD)
    file.seek(0)
    if "\0" in head:
        raise ValueError("it is not text")
    name = path.lower().removesuffix(".gz")
    start = head.lstrip()[:1]
    table = name.endswith((".csv", ".tsv")) or (start not in ("{", "[") and not name.endswith((".json", ".jsonl", ".ndjson")))
    if table:
        delimiter = "\t" if name.endswith(".tsv") else find_delimiter(head, len(head) < _HEAD)

        def lines() -> Iterator[str]:
            file.seek(0)
            return (line for _, line in _lines(file, path))

        records = read_table(lines, delimiter, path, MAX_LINE, MAX_ROWS)
        return (Row(number, f"{path}:{line}", values) for number, (line, values) in enumerate(records, 1))
    if start == "[":
        return _json(file, path, by_lines=False)
    line = file.readline(MAX_LINE + 1)
    file.seek(0)
    named_json = name.endswith(".json")
    if start == "{" and (named_json or len(line) <= MAX_LINE) and (not line.rstrip().endswith("}") or _is_container(line)):
        return _json(file, path, by_lines=not named_json)
    return _json_lines(file, path)


def _is_container(line: str) -> bool:
    """Return whether the line is a JSON object that holds rows."""
    try:
        return _list_inside(json.loads(line)) is not None
    except (ValueError, RecursionError):
        return False


def _json_lines(file: TextIO, path: str) -> Iterator[Row]:
    blank = 0
    for number, text in _lines(file, path):
        if not text.strip():
            blank = blank or number
            continue
        if blank:
            raise DataError(f"{path}:{blank}: empty line; write one JSON object on every line")
        place = f"{path}:{number}"
        try:
            value = _parsed(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not a JSON object: {error}; write one on every line") from None
        yield Row(number, place, _as_row(value, place))


def _json(file: TextIO, path: str, by_lines: bool) -> Iterator[Row]:
    """Yield the rows of one JSON value. ``by_lines``: where it is none, the file was meant as JSON Lines."""
    text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has more than {MAX_TEXT:,} characters, and a JSON list is read as a whole; write JSON Lines")
    try:
        value = _parsed(text)
    except (ValueError, RecursionError) as error:
        if by_lines or (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"):
            file.seek(0)
            yield from _json_lines(file, path)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(f"{path}:{line}: not JSON: {error}; write a list of objects, or an object on every line") from None
    items = value if isinstance(value, list) else _list_inside(value)
    if items is None:
        yield Row(1, f"{path}: row 1", _as_row(value, path))  # JSON Lines of one line, or an object over several
        return
    for number, item in enumerate(items, 1):
        place = f"{path}: row {number}"
        yield Row(number, place, _as_row(item, place))


def _list_inside(value: Any) -> list[Any] | None:
    """Return the one list of rows that an object holds, as in ``{"data": [...]}``; None where there is none, or several."""
    if not isinstance(value, dict):
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
    return lists[0] if len(lists) == 1 else None


def _as_row(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value, 1)}
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row should be an object, found {preview(value)}; write {{column: value, ...}}")
    return value


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_unique_keys)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in [earlier for earlier, _ in pairs[:i]])
        raise ValueError(f"key {preview(repeated)} appears twice")
    return values


def _parquet(raw: BinaryIO, path: str) -> Iterator[Row]:
    import pyarrow as pa  # half a second that other formats need not wait for
    import pyarrow.parquet as pq

    size, number = 0, 0
    try:
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=256):
            size += batch.nbytes
            if size > MAX_TEXT:
                raise ValueError(f"it has more than {MAX_TEXT:,} bytes, unpacked; give a smaller file")
            for values in batch.to_pylist():
                number += 1
                yield Row(number, f"{path}: row {number}", values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it is a damaged Parquet file ({one_line(error)})") from None


def _words_of(raw: BinaryIO) -> dict[str, tuple[str, ...]]:
    """Return the words of integer labels that ``datasets`` writes beside a table (``ClassLabel``)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(raw).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (pa.ArrowException, OSError, ValueError, AttributeError):
        return {}
