"""Writing results: JSON without NaN, whole files by one rename, lines flushed as they are written."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

SCHEMA_VERSION = "1.0"


@contextmanager
def open_user_text(path: Path, most: int | None = None) -> Iterator[TextIO]:
    """A text file, open for reading; a byte-order mark, which some editors write, is left out.

    Args:
        most: bytes at most.

    Raises:
        ValueError: no such file, not a regular one, too long, not readable, or (while it is read) not UTF-8; the message says
            which, in words.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"it is {_kind(about.st_mode)}, not a file")
        if most is not None and about.st_size > most:
            raise ValueError(f"it has {about.st_size:,} bytes, {most:,} are allowed")
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a socket")


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes None, everything else stays."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clean(value: Any) -> Any:
    """The same structure with every number that is not finite as null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return finite_or_none(value)


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
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
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: Path, content: Mapping[str, Any], lists: Mapping[str, Iterable[Mapping[str, Any]]] | None = None) -> None:
    """Write an object with its ``schema_version`` first; ``lists`` follow, a record per line."""
    with json_lists(path, content) as writer:
        for name, records in (lists or {}).items():
            writer.begin(name)
            for record in records:
                writer.add(record)


class JsonLists:
    """A JSON object under construction whose last members are long lists, written record by record: a line each."""

    def __init__(self, file: TextIO, content: Mapping[str, Any]) -> None:
        head = json.dumps(clean({"schema_version": SCHEMA_VERSION, **content}), ensure_ascii=False, indent=1, allow_nan=False)
        self._file, self._open, self._first = file, False, True
        file.write(head.removesuffix("\n}"))

    def begin(self, name: str) -> None:
        """End the list before, if any, and begin one."""
        self._end()
        self._file.write(f",\n {json.dumps(name)}: [")
        self._open = self._first = True

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record to the list."""
        text = json.dumps(clean(record), ensure_ascii=False, allow_nan=False)
        self._file.write(("" if self._first else ",") + "\n  " + text)
        self._first = False

    def close(self) -> None:
        """End the object."""
        self._end()
        self._file.write("\n}\n")

    def _end(self) -> None:
        if self._open:
            self._file.write("\n ]")


@contextmanager
def json_lists(path: Path, content: Mapping[str, Any]) -> Iterator[JsonLists]:
    """Write an object with its ``schema_version`` first, and then lists that never are in memory as a whole."""
    with atomic_write(path) as file:
        writer = JsonLists(file, content)
        yield writer
        writer.close()


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records as JSON lines, each with its ``schema_version``, and flush them to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """The same as a whole file, of records taken one by one."""
    with atomic_write(path) as file:
        file.writelines(map(_line, records))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(clean({"schema_version": SCHEMA_VERSION, **record}), ensure_ascii=False, allow_nan=False) + "\n"
