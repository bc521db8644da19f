"""Progress where there is no terminal: signs of life at a pace that a log can take, and no bars of anybody."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cedkv.runs import progress
from cedkv.runs.progress import Progress


def test_lines_at_most_every_half_minute_and_one_a_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    told = Progress({"unit/00001": 500, "unit/00002": 200}, done=[1000])
    for at, arm in ((0.0, "teacher"), (29.0, "base"), (31.0, "select"), (60.0, "random 1/5"), (62.0, "random 2/5")):
        now = at
        told.step("unit/00001", arm, 100)
    now = 70.0
    told.unit("unit/00001")
    now = 99.0
    told.step("unit/00002", "teacher", 200)
    now = 101.0
    told.unit("unit/00002")
    told.close()
    assert capsys.readouterr().err.splitlines() == [
        "teacher (1,000 of 1,700 evaluations done)",
        "select (1,200 of 1,700 evaluations done)",
        "random 2/5 (1,400 of 1,700 evaluations done)",
        "unit/00001 done (2 of 3 units, about 00:28 left)",
        "unit/00002 done (3 of 3 units)",
    ]


def test_units_at_once_are_counted_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An arm of one unit does not end the arm of another; a unit that is begun anew counts once, and so does a finished one."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    told = Progress({"a": 200, "b": 100, "c": 100}, done=[])
    for unit, arm, count in (("a", "teacher", 150), ("b", "teacher", 50), ("b", "base", 50), ("a", "base", 50)):
        now += 40
        told.step(unit, arm, count)
    told.unit("b")
    for arm, count in (("teacher", 150), ("base", 50)):  # the worker of a died; another one begins it anew
        now += 40
        told.step("a", arm, count)
    told.unit("a")
    told.step("c", "teacher", 100)
    told.unit("c")
    told.close()
    assert [line.partition(", about")[0] for line in capsys.readouterr().err.splitlines()] == [
        "teacher (0 of 400 evaluations done)",
        "2 units at once (0 of 400 evaluations done)",
        "2 units at once (50 of 400 evaluations done)",
        "2 units at once (200 of 400 evaluations done)",
        "b done (1 of 3 units",
        "teacher (300 of 400 evaluations done)",
        "base (300 of 400 evaluations done)",
        "a done (2 of 3 units",
        "c done (3 of 3 units)",
    ]


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    told = Progress({"unit/00000": 20, "unit/00001": 20}, done=[])
    told.step("unit/00000", "teacher", 20)
    told.unit("unit/00000")
    told.close()
    shown = capsys.readouterr().err
    assert "teacher: " in shown
    assert "20/40" in shown
    assert "evaluations done" not in shown
    assert "unit/00000" not in shown


def test_bars_of_libraries_are_off_without_a_terminal() -> None:
    """Weights that load and a GGUF that is converted draw a bar of hundreds of lines into a log; a set value stays."""
    program = (
        "import sys\n"
        "from cedkv.cli import app\n"
        "try:\n"
        "    app.execute(app.RunRequest('phase2', 'no-such-file.yaml'))\n"
        "except SystemExit: pass\n"
        "from tqdm import tqdm\n"
        "print(sum(tqdm(range(3), desc='Loading weights')))\n"
    )
    for setting, bars in (({}, False), ({"TQDM_DISABLE": ""}, True)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": ":".join(sys.path), **setting},
        )
        assert done.stdout == "3\n"
        assert ("Loading weights" in done.stderr) == bars
