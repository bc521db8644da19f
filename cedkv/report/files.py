"""Writing results: JSON without NaN, whole files by one rename, lines flushed as they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cedkv.metrics_phase2 import finite_or_none
from cedkv.types import Record

SCHEMA_VERSION = "1.0"


def clean(value: Any) -> Any:
    """The same structure with every number that is not finite as null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return finite_or_none(value)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file that is never seen half-written: it takes its name when the block ends, and is then on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power loss (a no-op where folders cannot be opened)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, content: Mapping[str, Any], long: Mapping[str, Iterable[Record]] | None = None) -> None:
    """Write an object with its ``schema_version`` first.

    Args:
        long: lists that follow the rest, taken and written record by record, one a line: they never are in memory as a whole.
    """
    text = json.dumps(clean({"schema_version": SCHEMA_VERSION, **content}), ensure_ascii=False, indent=1, allow_nan=False)
    with replacing(path) as file:
        file.write(text.removesuffix("\n}"))
        for name, records in (long or {}).items():
            file.write(f",\n {json.dumps(name)}: [")
            for at, record in enumerate(records):
                file.write(("," if at else "") + "\n  " + json.dumps(clean(record), ensure_ascii=False, allow_nan=False))
            file.write("\n ]")
        file.write("\n}\n")


def append_lines(path: Path, records: Sequence[Record]) -> None:
    """Append records as JSON lines, each with its ``schema_version``, and flush them to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """The same as a whole file, of records taken one by one."""
    with replacing(path) as file:
        file.writelines(map(_line, records))


def _line(record: Record) -> str:
    return json.dumps(clean({"schema_version": SCHEMA_VERSION, **record}), ensure_ascii=False, allow_nan=False) + "\n"
