"""``journal.jsonl``: the finished units of a run, each on disk as soon as it is finished; a run is resumed from its journal.

The first line says what the run depends on; each further line is a unit with the records of every condition:

    {"sha256":"...","header":{...}}
    {"sha256":"...","unit":"unit/00000","sizes":[812,790],"records":[[...],[...]]}

In a run of several tasks a unit is of one of them (``symbol_lookup/unit/00000``), and conditions of the others have no records
there. The digest covers the rest of its line. A last line that does not match its digest was being written when the process or
the machine stopped: the line is cut off and its unit computed again. Any other such line is damage, and an error. The JSON is
Python's dialect: NaN stays NaN, so that gates decide the same after a resume.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cedkv.core.errors import ConfigError, DataError, RunInterrupted
from cedkv.core.files import SCHEMA_VERSION, sync_folder
from cedkv.core.text import preview
from cedkv.core.values import Record

NAME = "journal.jsonl"
_DIGEST_PREFIX = b'{"sha256":"'
_CONTENT_START = len(_DIGEST_PREFIX) + 64 + 2
"""Offset in a line of what its digest covers: 64 hexadecimal digits, a quote and a comma follow the prefix."""
_RECORDS = b',"records":['


class Journal:
    """The journal of a run, open for appending; memory holds only the offsets of each unit's records.

    units: keys of the finished units, in their order.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], conditions: Sequence[str], append: bool = True) -> None:
        """Start a journal, or continue the existing one.

        Args:
            header: what the run depends on, flat; a resumed run must agree in every value.
            conditions: keys of the conditions, in the order of a line's records.
            append: False reads the journal and leaves it as it is.

        Raises:
            ConfigError: the journal is of a run that depends on other values; each difference is named.
            DataError: the journal is damaged.
            RunInterrupted: the journal cannot be written.
        """
        self.path = path
        self.units: list[str] = []
        self._conditions = list(conditions)
        self._extents: list[list[tuple[int, int]]] = []  # per unit and condition: offset and size of the records in the file
        self._end = 0
        if path.exists():
            self._read(header)
        if not append:
            return
        self._file = path.open("ab", buffering=0)
        try:
            self._file.truncate(self._end)
            if not self._end:
                self._write(_line({"header": {"schema_version": SCHEMA_VERSION, **header}}))
                sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, unit: str, records: Mapping[str, Sequence[Record]]) -> None:
        """Write a finished unit, which is on disk when this returns.

        Args:
            records: the records of the conditions that the unit has, by their key.

        Raises:
            RunInterrupted: the disk is full.
        """
        parts = [_dumps(list(records.get(key, ()))) for key in self._conditions]
        head = _dumps({"unit": unit, "sizes": [len(part) for part in parts]})[:-1].encode()
        offset = self._end + _CONTENT_START + len(head) - 1 + len(_RECORDS)
        self._write(_with_digest(head[1:] + _RECORDS + ",".join(parts).encode() + b"]}"))
        self._add(unit, offset, [len(part) for part in parts])

    def require_plan(self, planned: Sequence[str]) -> None:
        """Raise DataError if the units are not the first ones of the plan in its order (a line is repeated or moved)."""
        for number, unit in enumerate(self.units, 2):
            if planned[number - 2 : number - 1] != [unit]:
                raise self._damaged(number, f"unit {preview(unit)} is not the one that belongs there")

    def records(self, condition: str) -> Iterator[Record]:
        """Yield all records of a condition, in the order of units, read from disk unit by unit."""
        column = self._conditions.index(condition)
        with self.path.open("rb") as file:
            for extents in self._extents:
                offset, size = extents[column]
                file.seek(offset)
                yield from json.loads(file.read(size))

    def close(self) -> None:
        """Close the file; written records can still be read."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        try:
            remaining = memoryview(line)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunInterrupted(
                f"{self.path} cannot be written: {error}. Finished units are safe in it; free space, then continue with "
                f"--resume {self.path.parent.name}"
            ) from error
        self._end += len(line)

    def _add(self, unit: str, offset: int, sizes: Sequence[int]) -> None:
        """Register a unit whose first records are at ``offset``; a comma separates the records of two conditions."""
        self.units.append(unit)
        extents = []
        for size in sizes:
            extents.append((offset, size))
            offset += size + 1
        self._extents.append(extents)

    def _read(self, header: Mapping[str, Any]) -> None:
        """Register the units of an existing journal, up to a last line that is incomplete."""
        file_size = self.path.stat().st_size
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not _is_intact(line):
                    if self._end + len(line) == file_size:
                        return  # the line was being written when the process or the machine stopped
                    raise self._damaged(number, "the line does not match its sha256")
                if number == 1:
                    stored = json.loads(line).get("header")
                    if stored is None:
                        raise self._damaged(number, "the line is not a header")
                    _reject_other_header(self.path.parent.name, stored, {"schema_version": SCHEMA_VERSION, **header})
                else:
                    split = line.find(_RECORDS)
                    if split < 0:
                        raise self._damaged(number, "the line is not a unit")
                    head = json.loads(b"{" + line[_CONTENT_START:split] + b"}")
                    self._add(head["unit"], self._end + split + len(_RECORDS), head["sizes"])
                self._end += len(line)

    def _damaged(self, number: int, problem: str) -> DataError:
        return DataError(
            f"{self.path}:{number}: {problem}: the file was damaged or edited. To compute everything from there on again, keep "
            f"only the lines before it (head -n {number - 1})"
        )


def read_journal(path: Path, conditions: Sequence[str]) -> tuple[dict[str, Any], Callable[[str], Iterator[Record]]]:
    """Read a finished run's journal without writing to it.

    Args:
        conditions: keys of the conditions, in the order of a line's records.

    Returns:
        What the run depends on, and a function that yields the records of a condition.

    Raises:
        DataError: there is no journal, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            first_line = file.readline()
        header = json.loads(first_line)["header"] if _is_intact(first_line) else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; it was damaged, or removed") from None
    if header is None:
        raise DataError(f"{path}:1: the line does not match its sha256: the file was damaged or edited")
    depends_on = {name: value for name, value in header.items() if name != "schema_version"}
    journal = Journal(path, depends_on, conditions, append=False)
    if journal._end != path.stat().st_size:
        raise journal._damaged(len(journal.units) + 2, "the line does not match its sha256")
    return header, journal.records


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line per name whose values differ: name, stored value, current value."""
    missing = "(missing)"
    return [
        f"{name}: {preview(stored.get(name, missing), 100)} then, {preview(current.get(name, missing), 100)} now"
        for name in dict.fromkeys([*stored, *current])
        if stored.get(name, missing) != current.get(name, missing)
    ]


def reject_changes(run_id: str, changed: Sequence[str]) -> None:
    """Raise ConfigError, which names each change, if there is any.

    Args:
        changed: lines of ``differences``.
    """
    if changed:
        changed = sorted(changed, key=lambda line: not line.startswith("versions."))  # another version explains the rest
        omitted = [f"... and {len(changed) - 12} more"] if len(changed) > 12 else []
        raise ConfigError(
            f"run {run_id} cannot be resumed, because its results would be of two kinds:\n  "
            + "\n  ".join([*changed[:12], *omitted])
            + "\nResume it with what it was started with (leave all other options out), or start a new run"
        )


def _reject_other_header(run_id: str, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    as_stored = json.loads(_dumps(current))  # JSON has no tuples: compare what would be stored
    reject_changes(run_id, differences(stored, as_stored))


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _line(content: Any) -> bytes:
    return _with_digest(_dumps(content)[1:].encode())


def _with_digest(content: bytes) -> bytes:
    """Return a line: the digest of ``content``, which is a JSON object without its opening brace, and ``content``."""
    return _DIGEST_PREFIX + hashlib.sha256(content).hexdigest().encode() + b'",' + content + b"\n"


def _is_intact(line: bytes) -> bool:
    content = line[_CONTENT_START:]
    return content.endswith(b"}\n") and line == _with_digest(content[:-1])
