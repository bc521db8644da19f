"""``journal.jsonl``: the finished units of a run, each on disk as soon as it is finished; a run is resumed from its journal.

The first line says what the run depends on, and the keys of all its units in their order; each further line is a unit, in the
order in which units were finished, with the device that computed it and the records of every condition:

    {"sha256":"...","header":{"units":["unit/00000",...],...}}
    {"sha256":"...","unit":"unit/00000","ran_on":{...},"sizes":[812,790],"records":[[...],[...]]}

In a run of several tasks a unit is of one of them (``symbol_lookup/unit/00000``), and conditions of the others have no records
there. Records are read in the order of the plan, so that nothing depends on which unit was finished first. The digest covers
the rest of its line. A last line that does not match its digest was being written when the process or the machine stopped: the
line is cut off and its unit computed again. Any other such line is damage, and an error. The JSON is Python's dialect: NaN
stays NaN, so that gates decide the same after a resume.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cedkv.core.errors import ConfigError, DataError, RunInterrupted
from cedkv.core.files import SCHEMA_VERSION, sync_folder
from cedkv.core.text import preview
from cedkv.core.values import Record
from cedkv.runs.outputs import write_remedy

NAME = "journal.jsonl"
_DIGEST_PREFIX = b'{"sha256":"'
_CONTENT_START = len(_DIGEST_PREFIX) + 64 + 2
"""Offset in a line of what its digest covers: 64 hexadecimal digits, a quote and a comma follow the prefix."""
_RECORDS = b',"records":['
UNITS = "units"
"""Name in the header under which the keys of all planned units stand."""


class Journal:
    """The journal of a run, open for appending; memory holds only the offsets of each unit's records.

    planned: keys of all units, in their order. ran_on: key of a finished unit -> the device that computed it, in the order in
    which units were finished.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], conditions: Sequence[str], append: bool = True) -> None:
        """Start a journal, or continue the existing one.

        Args:
            header: what the run depends on, flat, and its planned units (``UNITS``); a resumed run must agree in every value.
            conditions: keys of the conditions, in the order of a line's records.
            append: False reads the journal and leaves it as it is.

        Raises:
            ConfigError: the journal is of a run that depends on other values; each difference is named.
            DataError: the journal is damaged.
            OSError: the journal cannot be written.
        """
        self.path = path
        self.planned: list[str] = list(header[UNITS])
        self.ran_on: dict[str, dict[str, Any]] = {}
        self._conditions = list(conditions)
        self._lines: dict[str, tuple[int, int]] = {}  # per unit: offset and size of its line in the file
        # per unit and condition: offset and size of the records in the file
        self._extents: dict[str, list[tuple[int, int]]] = {}
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

    @property
    def missing(self) -> list[str]:
        """Keys of the planned units that are not finished, in their order."""
        return [unit for unit in self.planned if unit not in self._extents]

    @property
    def in_order(self) -> bool:
        """Whether units were finished in the order of the plan."""
        return list(self._extents) == [unit for unit in self.planned if unit in self._extents]

    def append(self, unit: str, ran_on: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> None:
        """Write a finished unit, which is on disk when this returns.

        Args:
            ran_on: the device that computed the unit.
            records: the records of the conditions that the unit has, by their key.

        Raises:
            RunInterrupted: the disk is full, or fails.
        """
        parts = [_dumps(list(records.get(key, ()))) for key in self._conditions]
        head = _dumps({"unit": unit, "ran_on": ran_on, "sizes": [len(part) for part in parts]})[:-1].encode()
        try:
            self._append(_with_digest(head[1:] + _RECORDS + ",".join(parts).encode() + b"]}"))
        except OSError as error:
            raise RunInterrupted(
                f"{self.path} cannot be written: {error}. Finished units are safe in it; {write_remedy(error)}, then continue "
                f"with --resume {self.path.parent.name}"
            ) from error

    def copy(self, parts: Sequence[Journal]) -> None:
        """Append the units of other journals, byte by byte, in the order of the plan; each of them is on disk then.

        Args:
            parts: journals of the same conditions, which together have every planned unit once.

        Raises:
            DataError: one of them is damaged.
            OSError: this journal cannot be written.
        """
        part_of = {unit: part for part in parts for unit in part.ran_on}
        for unit in self.planned:
            self._append(part_of[unit].line(unit))

    def line(self, unit: str) -> bytes:
        """Return the line of a finished unit, read from disk."""
        offset, size = self._lines[unit]
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.read(size)
        if not _is_intact(line):
            raise DataError(f"{self.path}: the line of unit {unit} does not match its sha256: the file was damaged or edited")
        return line

    def records(self, condition: str) -> Iterator[Record]:
        """Yield all records of a condition, in the order of planned units, read from disk unit by unit."""
        for unit in self.planned:
            if unit in self._extents:
                yield from self.records_of(unit, condition)

    def records_of(self, unit: str, condition: str) -> list[Record]:
        """Return the records of a condition in a finished unit."""
        offset, size = self._extents[unit][self._conditions.index(condition)]
        with self.path.open("rb") as file:
            file.seek(offset)
            records: list[Record] = json.loads(file.read(size))
        return records

    def close(self) -> None:
        """Close the file; written records can still be read."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        remaining = memoryview(line)
        while remaining:
            remaining = remaining[self._file.write(remaining) :]
        os.fsync(self._file.fileno())
        self._end += len(line)

    def _append(self, line: bytes) -> None:
        offset = self._end
        self._write(line)
        self._register(offset, line)

    def _register(self, offset: int, line: bytes) -> None:
        """Register the unit whose line is at ``offset``; a comma separates the records of two conditions."""
        split = line.index(_RECORDS)
        head = json.loads(b"{" + line[_CONTENT_START:split] + b"}")
        extents, start = [], offset + split + len(_RECORDS)
        for size in head["sizes"]:
            extents.append((start, size))
            start += size + 1
        self._extents[head["unit"]] = extents
        self._lines[head["unit"]] = (offset, len(line))
        self.ran_on[head["unit"]] = head["ran_on"]

    def _read(self, header: Mapping[str, Any]) -> None:
        """Register the units of an existing journal, up to a last line that is incomplete."""
        file_size, planned = self.path.stat().st_size, set(self.planned)
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
                    current = as_stored({"schema_version": SCHEMA_VERSION, **header})
                    _reject_other_header(self.path.parent.name, stored, current)
                else:
                    split = line.find(_RECORDS)
                    if split < 0:
                        raise self._damaged(number, "the line is not a unit")
                    unit = json.loads(b"{" + line[_CONTENT_START:split] + b"}")["unit"]
                    if unit not in planned:
                        raise self._damaged(number, f"unit {preview(unit)} is none of this run")
                    if unit in self._extents:
                        raise self._damaged(number, f"unit {preview(unit)} stands there twice")
                    self._register(self._end, line)
                self._end += len(line)

    def _damaged(self, number: int, problem: str) -> DataError:
        return DataError(
            f"{self.path}:{number}: {problem}: the file was damaged or edited. To compute everything from there on again, keep "
            f"only the lines before it (head -n {number - 1})"
        )


def read_journal(path: Path, conditions: Sequence[str]) -> tuple[dict[str, Any], Journal]:
    """Read a finished run's journal without writing to it.

    Args:
        conditions: keys of the conditions, in the order of a line's records.

    Returns:
        What the run depends on, and the journal.

    Raises:
        DataError: there is no journal, or it is damaged.
    """
    header = read_header(path)
    if UNITS not in header:
        raise DataError(
            f"{path} has schema_version {header.get('schema_version')}, and its records can be read from 1.3 on; read the run "
            "with the version of cedkv that wrote it, which stands in its report_phase2.json"
        )
    depends_on = {name: value for name, value in header.items() if name != "schema_version"}
    journal = Journal(path, depends_on, conditions, append=False)
    if journal._end != path.stat().st_size:
        raise journal._damaged(len(journal.ran_on) + 2, "the line does not match its sha256")
    return header, journal


def stored_value(path: Path, name: str) -> Any:
    """Return a value that a journal's run depends on; None where there is none, or no journal, or one that is damaged."""
    try:
        return read_header(path).get(name)
    except DataError:
        return None


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], then: str = "then", now: str = "now") -> list[str]:
    """Return one line per name whose values differ: name, stored value, current value.

    Args:
        then, now: what follows a stored and a current value.
    """
    missing = "(missing)"
    return [
        f"{name}: {preview(stored.get(name, missing), 100)} {then}, {preview(current.get(name, missing), 100)} {now}"
        for name in dict.fromkeys([*stored, *current])
        if stored.get(name, missing) != current.get(name, missing)
    ]


def as_lines(changed: Sequence[str]) -> str:
    """Return lines of ``differences`` as part of a message: indented, versions first, at most twelve."""
    changed = sorted(changed, key=lambda line: not line.startswith("versions."))  # another version explains the rest
    omitted = [f"... and {len(changed) - 12} more"] if len(changed) > 12 else []
    return "\n  ".join(["", *changed[:12], *omitted])


def reject_changes(run_id: str, changed: Sequence[str]) -> None:
    """Raise ConfigError, which names each change, if there is any.

    Args:
        changed: lines of ``differences``.
    """
    if changed:
        raise ConfigError(
            f"run {run_id} cannot be resumed, because its results would be of two kinds:{as_lines(changed)}\n"
            "Resume it with what it was started with (leave all other options out), or start a new run"
        )


def as_stored(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header as it is read from a journal: JSON has no tuples."""
    stored: dict[str, Any] = json.loads(_dumps(header))
    return stored


def _reject_other_header(run_id: str, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    changed = differences(stored, current)
    if changed and all(is_code(name) for name in {*stored, *current} if stored.get(name) != current.get(name)):
        raise ConfigError(
            f"run {run_id} was started with other code, and a part of its results would be of each:{as_lines(changed)}\n"
            "Go back to that code or start a new run; where the change cannot matter, runtime.allow_other_code=true resumes "
            "the run, and tags it code=changed"
        )
    reject_changes(run_id, changed)


def is_code(name: str) -> bool:
    """Return whether a name of a header is the digest of code that computes: this package's, or of an extension's module."""
    return name == "versions.code" or name.rpartition(": ")[2].startswith("code.")


def read_header(path: Path) -> dict[str, Any]:
    """Return what the run of a journal depends on.

    Raises:
        DataError: there is no journal, or its first line is damaged.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; it was damaged, or removed") from None
    if not _is_intact(line) or "header" not in (content := json.loads(line)):
        raise DataError(f"{path}:1: the line does not match its sha256: the file was damaged or edited")
    header: dict[str, Any] = content["header"]
    return header


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
