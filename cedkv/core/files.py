"""Read the user's text files, and write results: JSON without NaN, files in one rename, lines flushed to disk."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

SCHEMA_VERSION = "1.3"
"""``schema_version`` of every JSON object and JSON line that is written here."""
_NO_SYNC_OF_FOLDERS = {
    *(errno.EACCES, errno.EISDIR),  # the folder cannot be opened
    *(errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
}
"""What systems and file systems answer that cannot flush a folder; the files in it are on disk all the same."""


@contextmanager
def open_user_bytes(path: Path, max_bytes: int | None = None) -> Iterator[BufferedReader]:
    """Open a file for reading.

    Args:
        max_bytes: largest size that is accepted; None for any.

    Raises:
        ValueError: no such file, not a regular file, too large, not readable, or (while its text is read) not UTF-8; the
            message says which.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"it is {_kind(status.st_mode)}, not a file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise ValueError(f"it has {status.st_size:,} bytes, {max_bytes:,} are allowed")
        with path.open("rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


@contextmanager
def open_user_text(path: Path, max_bytes: int | None = None) -> Iterator[TextIO]:
    """Open a text file as ``open_user_bytes`` does; a byte-order mark, which some editors write, is skipped."""
    with open_user_bytes(path, max_bytes) as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
        yield file


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a socket")


def finite_or_none(value: Any) -> Any:
    """Return None for a number that is not finite, because JSON has no NaN, and any other value unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clean(value: Any) -> Any:
    """Return the same structure with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return finite_or_none(value)


@contextmanager
def atomic_write(path: Path, mark: str = "") -> Iterator[TextIO]:
    """Open a file for writing that gets its name only when the block ends, complete and on disk: no reader sees half of it.

    Args:
        mark: part of the temporary name; processes that may write the same file at once each need one of their own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{mark}.part")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that new names in it survive a power loss; a no-op where folders cannot be flushed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as ``atomic_write`` does."""
    with atomic_write(path) as file:
        file.write(text)


def write_shared_text(path: Path, text: str) -> None:
    """Write a text file that other processes may write at the same time; it is the text of one of them, whole."""
    with atomic_write(path, f".{uuid4().hex}") as file:
        file.write(text)


def write_json(path: Path, content: Mapping[str, Any], lists: Mapping[str, Iterable[Mapping[str, Any]]] | None = None) -> None:
    """Write an object, ``schema_version`` first, as ``atomic_write`` does; ``lists`` follow, one record per line."""
    with json_lists(path, content) as writer:
        for name, records in (lists or {}).items():
            writer.begin(name)
            for record in records:
                writer.add(record)


class JsonLists:
    """Writes a JSON object whose last members are long lists, one record per line: no list is in memory as a whole."""

    def __init__(self, file: TextIO, content: Mapping[str, Any]) -> None:
        head = json.dumps(clean({"schema_version": SCHEMA_VERSION, **content}), ensure_ascii=False, indent=1, allow_nan=False)
        self._file, self._list_open, self._first_record = file, False, True
        file.write(head.removesuffix("\n}"))

    def begin(self, name: str) -> None:
        """Begin a list; the one before ends."""
        self._end_list()
        self._file.write(f",\n {json.dumps(name)}: [")
        self._list_open = self._first_record = True

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record to the list."""
        text = json.dumps(clean(record), ensure_ascii=False, allow_nan=False)
        self._file.write(("" if self._first_record else ",") + "\n  " + text)
        self._first_record = False

    def close(self) -> None:
        """End the object."""
        self._end_list()
        self._file.write("\n}\n")

    def _end_list(self) -> None:
        if self._list_open:
            self._file.write("\n ]")


@contextmanager
def json_lists(path: Path, content: Mapping[str, Any]) -> Iterator[JsonLists]:
    """Open an object, ``schema_version`` first, for lists that are written record by record, as ``atomic_write`` does."""
    with atomic_write(path) as file:
        writer = JsonLists(file, content)
        yield writer
        writer.close()


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records as JSON lines, each with ``schema_version`` first, and flush them to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the lines that ``append_lines`` would append as a new file, taking the records one by one."""
    with atomic_write(path) as file:
        file.writelines(map(_line, records))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(clean({"schema_version": SCHEMA_VERSION, **record}), ensure_ascii=False, allow_nan=False) + "\n"
