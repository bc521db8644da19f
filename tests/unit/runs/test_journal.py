"""The journal: what was finished is there, what was torn is done again, and what was damaged is not believed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.core.errors import ConfigError, DataError, RunInterrupted
from cedkv.runs.journal import Journal, differences

RAN_ON = {"runtime.device": "cpu"}
UNITS = [
    ("main/00000", {"a": [{"x": 0.1, "text": "ü \u2028 \ud800"}, {"x": math.nan}], "b,\"records\":[": []}),
    ("main/00001", {"a": [{"x": math.inf}], "b,\"records\":[": [{"y": 1}]}),
    ("repro-1/00000", {"a": [], "b,\"records\":[": [{"y": "\n"}, {"y": [1, 2]}]}),
]  # fmt: skip
KEYS = list(UNITS[0][1])
HEADER = {"run_id": "r", "phase2.seed": 42, "samples.on.digest": "abc", "units": [unit for unit, _ in UNITS]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write(path: Path, units: Any = UNITS) -> bytes:
    journal = Journal(path, HEADER, KEYS)
    for unit, records in units:
        journal.append(unit, RAN_ON, records)
    journal.close()
    return path.read_bytes()


def read(path: Path) -> tuple[list[str], dict[str, str]]:
    journal = Journal(path, HEADER, KEYS)
    journal.close()
    return list(journal.ran_on), {key: repr(list(journal.records(key))) for key in KEYS}


def expected(n: int) -> tuple[list[str], dict[str, str]]:
    some = UNITS[:n]
    return [unit for unit, _ in some], {key: repr([r for _, records in some for r in records[key]]) for key in KEYS}


def test_what_was_written_is_read_by_condition(path: Path) -> None:
    """NaN stays NaN: as null it would be another verdict after a resume."""
    write(path)
    assert read(path) == expected(3)
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_every_torn_end_is_cut_off_and_written_again(path: Path) -> None:
    """The process may die at any byte: the finished units stay, the torn one goes, and the file comes out the same."""
    whole = write(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole) + 1, 11):
        path.write_bytes(whole[:cut])
        done = max(0, sum(end <= cut for end in ends) - 1)
        assert read(path) == expected(done)
        journal = Journal(path, HEADER, KEYS)
        for unit, records in UNITS[done:]:
            journal.append(unit, RAN_ON, records)
        journal.close()
        assert path.read_bytes() == whole


@settings(max_examples=80, deadline=None, derandomize=True)
@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_no_changed_byte_is_believed(tmp_path_factory: pytest.TempPathFactory, at: int, flip: int) -> None:
    """One flipped byte anywhere: the last line is done again, any other is named, and nothing wrong is ever read.

    Without the newline between them the last two lines are one line, the last: both are done again.
    """
    path = tmp_path_factory.mktemp("flip") / "journal.jsonl"
    whole = bytearray(write(path))
    at %= len(whole)
    last = whole.rindex(b"\n", 0, -1)
    whole[at] ^= flip
    path.write_bytes(bytes(whole))
    line = bytes(whole[:at]).count(b"\n") + 1
    if at >= last:
        assert read(path) == expected(2 if at > last else 1)
    else:
        with pytest.raises(DataError, match=rf"jsonl:{line}: the line does not match its sha256.*head -n {line - 1}\)"):
            read(path)


def test_garbage_after_the_last_line_is_cut_off(path: Path) -> None:
    """After a power loss a file may end in zeros."""
    whole = write(path)
    path.write_bytes(whole + b"\0" * 500)
    assert read(path) == expected(3)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ([0, 1, 1, 2], "jsonl:3: unit 'main/00000' stands there twice.*head -n 2"),
        ([0, 1, 2, 3, 3], "jsonl:5: unit 'repro-1/00000' stands there twice.*head -n 4"),
        ([0, 0, 1], "jsonl:2: the line is not a unit.*head -n 1"),
        ([1, 2], "jsonl:1: the line is not a header.*head -n 0"),
    ],
    ids=["twice", "one too many", "two headers", "no header"],
)
def test_lines_that_are_whole_and_in_the_wrong_place(path: Path, order: list[int], told: str) -> None:
    """A merge of two copies, a mistaken cut: it is said which line, and how to go on from before it."""
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[at] for at in order))

    with pytest.raises(DataError, match=told):
        Journal(path, HEADER, KEYS)
    path.write_bytes(b"".join(lines[:2]))
    assert read(path) == expected(1)


def test_units_in_any_order_are_read_in_the_order_of_the_plan(path: Path) -> None:
    """Workers finish units as they come; what is read does not depend on who was first."""
    write(path, [UNITS[2], UNITS[0]])
    journal = Journal(path, HEADER, KEYS)
    assert (journal.missing, journal.in_order) == (["main/00001"], False)
    journal.append(UNITS[1][0], RAN_ON, UNITS[1][1])
    assert (list(journal.ran_on), journal.missing) == (["repro-1/00000", "main/00000", "main/00001"], [])
    journal.close()
    assert read(path)[1] == expected(3)[1]


def test_copied_parts_are_the_journal_of_one_process(path: Path) -> None:
    """Byte by byte, in the order of the plan; a line that was damaged since its journal was read is not copied."""
    whole, parts = write(path), []
    for name, units in (("odd", UNITS[1:2]), ("even", [UNITS[2], UNITS[0]])):
        parts.append(Journal(path.with_name(name), HEADER, KEYS))
        for unit, records in units:
            parts[-1].append(unit, RAN_ON, records)
    path.unlink()
    journal = Journal(path, HEADER, KEYS)
    journal.copy(parts)
    assert path.read_bytes() == whole
    assert read(path) == expected(3)
    odd = path.with_name("odd")
    odd.write_bytes(odd.read_bytes().replace(b'{"y":1}', b'{"y":2}'))
    path.unlink()
    with pytest.raises(DataError, match=r"odd: the line of unit main/00001 does not match its sha256"):
        Journal(path, HEADER, KEYS).copy(parts)
    assert read(path) == expected(1)


def test_unit_of_another_plan_is_damage(path: Path) -> None:
    write(path, [*UNITS, ("main/00002", {})])
    with pytest.raises(DataError, match=r"jsonl:5: unit 'main/00002' is none of this run.*head -n 4"):
        Journal(path, HEADER, KEYS)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"phase2.seed": 43}, "phase2.seed: 42 then, 43 now"),
        ({"samples.on.digest": "abd"}, "samples.on.digest: 'abc' then, 'abd' now"),
        ({"new": 1}, "new: '(missing)' then, 1 now"),
    ],
)
def test_journal_of_something_else_is_rejected_and_left_alone(path: Path, changed: dict[str, Any], told: str) -> None:
    whole = write(path)
    with pytest.raises(ConfigError, match=r"run .* cannot be resumed") as caught:
        Journal(path, {**HEADER, **changed}, KEYS)
    assert told in str(caught.value)
    assert path.read_bytes() == whole


def test_differences_are_named_once_each() -> None:
    assert differences({"a": 1, "b": [1], "c": None}, {"c": None, "b": [2], "d": 0}) == [
        "a: 1 then, '(missing)' now",
        "b: [1] then, [2] now",
        "d: '(missing)' then, 0 now",
    ]


def test_full_disk_is_told_and_what_was_written_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, HEADER, KEYS)
    journal.append(UNITS[0][0], RAN_ON, UNITS[0][1])
    journal._file.close()
    journal._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(RunInterrupted, match=r"journal\.jsonl cannot be written: .*No space left.*--resume"):
        journal.append(UNITS[1][0], RAN_ON, UNITS[1][1])
    assert [list(journal.records(key)) for key in KEYS][1] == []
    journal.close()
    assert read(path) == expected(1)
