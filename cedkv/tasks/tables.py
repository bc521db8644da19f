"""Records of a CSV or TSV file: the delimiter, the header, and where a field is not written as it should be."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from cedkv.core.errors import DataError
from cedkv.core.text import preview

DELIMITERS = ",\t;|"
_NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d+)?\s*")
Record = tuple[int, dict[str, Any]]
"""The line that a record begins on, and its values; None where a field is empty."""


def find_delimiter(head: str, whole: bool) -> str:
    """Return the delimiter under which the first records have the same number of fields, the more fields the better.

    Args:
        head: the beginning of a file. whole: whether it is all of it, so that its last line is complete.
    """
    lines = head.splitlines(keepends=True)
    lines = lines if whole or len(lines) < 2 else lines[:-1]

    def fields(delimiter: str) -> tuple[bool, int]:
        records = [len(record) for record in islice(csv.reader(lines, delimiter=delimiter), 20) if record]
        return len(set(records)) == 1 and records[0] > 1, records[0] if records else 0

    return max(DELIMITERS, key=fields)


def read_table(lines: Callable[[], Iterator[str]], delimiter: str, path: str, longest: int, most: int) -> Iterator[Record]:
    """Yield the records of a table. A first line with a number in it is no header: columns are then named 1, 2, ...

    A file with tabs that is not readable with quotes is read without them: there they are often no quotes.

    Args:
        lines: returns the lines of the file, from its beginning.
        longest: the most characters of a field. most: the most records of a file with tabs, which is read before any is
            yielded.

    Raises:
        DataError: a record with other fields than the first line, or quotes that do not end; the message names the line.
    """
    if delimiter != "\t":
        yield from _records(lines(), delimiter, path, longest, csv.QUOTE_MINIMAL)
        return
    try:
        records = list(islice(_records(lines(), delimiter, path, longest, csv.QUOTE_MINIMAL), most + 1))
    except DataError:
        yield from _records(lines(), delimiter, path, longest, csv.QUOTE_NONE)
    else:
        yield from records


def _records(lines: Iterator[str], delimiter: str, path: str, longest: int, quoting: Any) -> Iterator[Record]:
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=quoting != csv.QUOTE_NONE)
    limit = csv.field_size_limit(longest)
    try:
        header, line = list[str](), 1
        for record in reader:
            start, line = line, reader.line_num + 1
            if not record:
                continue
            if not header:
                header = _header(record, f"{path}:{start}")
                if header != _numbered(record):
                    continue
            if len(record) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(record)} fields where the first line has {len(header)}; a field that holds the "
                    f"delimiter {delimiter!r} stands in double quotes"
                )
            yield start, {name: value or None for name, value in zip(header, record, strict=True)}
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not readable as CSV with the delimiter {delimiter!r}: {error}; a field that holds "
            "quotes stands in double quotes, and each of its own is doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _header(record: list[str], place: str) -> list[str]:
    if any(_NUMBER.fullmatch(cell) for cell in record):
        return _numbered(record)
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(record, 1)]
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated is not None:
        raise DataError(f"{place}: two columns are named {preview(repeated)}; give each its own name in the first line")
    return names


def _numbered(record: list[str]) -> list[str]:
    return [str(i) for i in range(1, len(record) + 1)]
