"""Nobody reads what a program prints: a closed pipe, a full disk under the log, no streams at all. It goes on all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cedkv.core.environment import environment_variables
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from cedkv.core import stdio

stdio.tolerate_closed_streams()
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("\\u2713 " * 50_000, file=stream)
with Path("made").open("w") as file:
    file.write(str(file.fileno()))
sys.exit(7)
"""


def closed_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def full_disk() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def none_at_all() -> None:
    os.closerange(0, 3)


NOBODY = pytest.mark.parametrize("nobody", [closed_pipe, full_disk, none_at_all])


def run(nobody: Callable[[], None], *arguments: str, cwd: Path = ROOT) -> int:
    environment = {**environment_variables(), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, preexec_fn=nobody, timeout=PATIENCE, check=False
    ).returncode


@NOBODY
def test_a_program_goes_on_and_no_file_takes_the_place_of_a_stream(nobody: Callable[[], None], tmp_path: Path) -> None:
    """Its own exit code comes out (Python's is 120 when a stream cannot be flushed), and a library that prints to number 2
    does not print into the journal."""
    assert run(nobody, "-c", PROGRAM, cwd=tmp_path) == 7
    assert int((tmp_path / "made").read_text()) > 2


@pytest.mark.parametrize(
    "module",
    ["cedkv", "cedkv_mvp", "entrypoints.phase2_eval", "entrypoints.ablate_selector", "entrypoints.compare_positioning"],
)
def test_every_program_is_such_a_one(module: str) -> None:
    assert run(full_disk, "-m", module, "--help") == 0


def test_what_is_read_is_whole(tmp_path: Path) -> None:
    """More than a pipe takes at once, and characters that the terminal's encoding does not have."""
    environment = {**environment_variables(), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PROGRAM]
    text = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=PATIENCE)
    assert text.stdout == text.stderr == (b"\\u2713 " * 50_000 + b"\n") * 3
