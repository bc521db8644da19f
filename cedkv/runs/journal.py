"""``journal.jsonl``: the finished units of a run, on disk as soon as they are finished; from it the run is resumed.

The first line says what the run depends on; each further line is a unit with the records of every condition:

    {"sha256":"...","header":{...}}
    {"sha256":"...","unit":"unit/00000","sizes":[812,790],"records":[[...],[...]]}

The digest is of the rest of its line. A last line that does not fit its digest was being written when the process or the
machine stopped: it is cut off, and its unit done again. Any other such line is damage, and an error. JSON here is Python's:
NaN stays NaN, so that gates decide the same after a resume.
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
_HEAD = b'{"sha256":"'
_REST = len(_HEAD) + 64 + 2
_RECORDS = b',"records":['


class Journal:
    """The journal of a run, open for appending. Held in memory is only where each unit's records are."""

    def __init__(self, path: Path, header: Mapping[str, Any], conditions: Sequence[str], append: bool = True) -> None:
        """Start a journal, or go on with the existing one.

        Args:
            header: what the run depends on, flat; a resumed run must agree in everything.
            conditions: keys of the conditions, in the order of a line's records.
            append: False reads the journal and leaves it as it is.

        Raises:
            ConfigError: the journal is of a run that depends on something else; each difference is named.
            DataError: the journal is damaged.
            RunInterrupted: it cannot be written.
        """
        self.path = path
        self.units: list[str] = []
        self._conditions = list(conditions)
        self._places: list[list[tuple[int, int]]] = []
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
        """Write a finished unit; it is on disk when this returns. Raises RunInterrupted (disk full)."""
        parts = [_dumps(list(records[key])) for key in self._conditions]
        head = _dumps({"unit": unit, "sizes": [len(part) for part in parts]})[:-1].encode()
        at = self._end + _REST + len(head) - 1 + len(_RECORDS)
        self._write(_signed(head[1:] + _RECORDS + ",".join(parts).encode() + b"]}"))
        self._add(unit, at, [len(part) for part in parts])

    def require_plan(self, planned: Sequence[str]) -> None:
        """Raises DataError: the units are not the first ones of the plan, in its order (a line twice, or moved)."""
        for number, unit in enumerate(self.units, 2):
            if planned[number - 2 : number - 1] != [unit]:
                raise self._damaged(number, f"unit {preview(unit)} is not the one that belongs there")

    def records(self, condition: str) -> Iterator[Record]:
        """All records of a condition, in the order of units, read from disk unit by unit."""
        column = self._conditions.index(condition)
        with self.path.open("rb") as file:
            for places in self._places:
                at, size = places[column]
                file.seek(at)
                yield from json.loads(file.read(size))

    def close(self) -> None:
        """Close the file; what was written can still be read."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunInterrupted(
                f"{self.path} cannot be written: {error}. Finished units are safe in it; free space, then go on with "
                f"--resume {self.path.parent.name}"
            ) from error
        self._end += len(line)

    def _add(self, unit: str, at: int, sizes: Sequence[int]) -> None:
        self.units.append(unit)
        places = []
        for size in sizes:
            places.append((at, size))
            at += size + 1
        self._places.append(places)

    def _read(self, header: Mapping[str, Any]) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not _holds(line):
                    if self._end + len(line) == size:
                        return  # torn
                    raise self._damaged(number, "the line does not fit its sha256")
                if number == 1:
                    then = json.loads(line).get("header")
                    if then is None:
                        raise self._damaged(number, "the line is no header")
                    _agree(self.path.parent.name, then, {"schema_version": SCHEMA_VERSION, **header})
                else:
                    split = line.find(_RECORDS)
                    if split < 0:
                        raise self._damaged(number, "the line is no unit")
                    head = json.loads(b"{" + line[_REST:split] + b"}")
                    self._add(head["unit"], self._end + split + len(_RECORDS), head["sizes"])
                self._end += len(line)

    def _damaged(self, number: int, what: str) -> DataError:
        return DataError(
            f"{self.path}:{number}: {what}: the file was damaged or edited. To do again what stands from there on, keep only "
            f"the lines before it (head -n {number - 1})"
        )


def read_journal(path: Path, conditions: Sequence[str]) -> tuple[dict[str, Any], Callable[[str], Iterator[Record]]]:
    """Read a finished run's journal without writing to it.

    Args:
        conditions: keys of the conditions, in the order of a line's records.

    Returns:
        What the run depends on, and a function that gives the records of a condition.

    Raises:
        DataError: there is no journal, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
        header = json.loads(first)["header"] if _holds(first) else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; it was damaged, or removed") from None
    if header is None:
        raise DataError(f"{path}:1: the line does not fit its sha256: the file was damaged or edited")
    written = Journal(path, {name: value for name, value in header.items() if name != "schema_version"}, conditions, False)
    if written._end != path.stat().st_size:
        raise written._damaged(len(written.units) + 2, "the line does not fit its sha256")
    return header, written.records


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each name whose values differ: name, old value, new value."""
    missing = "(not there)"
    return [
        f"{name}: {preview(then.get(name, missing), 100)} then, {preview(now.get(name, missing), 100)} now"
        for name in dict.fromkeys([*then, *now])
        if then.get(name, missing) != now.get(name, missing)
    ]


def reject_changes(run_id: str, changed: Sequence[str]) -> None:
    """Raises ConfigError, naming what changed, if anything did."""
    if changed:
        more = [f"... and {len(changed) - 12} more"] if len(changed) > 12 else []
        raise ConfigError(
            f"run {run_id} cannot be resumed, because its results would be of two kinds:\n  "
            + "\n  ".join([*changed[:12], *more])
            + "\nResume it with what it was started with (leave all other options out), or start a new run"
        )


def _agree(run_id: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    reject_changes(run_id, differences(then, json.loads(_dumps(now))))


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _line(content: Any) -> bytes:
    return _signed(_dumps(content)[1:].encode())


def _signed(rest: bytes) -> bytes:
    return _HEAD + hashlib.sha256(rest).hexdigest().encode() + b'",' + rest + b"\n"


def _holds(line: bytes) -> bool:
    rest = line[_REST:]
    return rest.endswith(b"}\n") and line == _signed(rest[:-1])
