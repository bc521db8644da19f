"""stdout and stderr whose reader may go away (``| head``, a full disk under the log) without ending a night's run."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Patient(io.FileIO):
    """A standard stream; what it does not take is lost: it also stands in the run's files."""

    def write(self, data: Any) -> int:
        try:
            taken = super().write(data)
        except OSError:
            taken = None
        return memoryview(data).nbytes if taken is None else taken


def tolerate_closed_streams() -> None:
    """Put the program's own streams in order, first thing.

    One that was closed at the start (``>&-``) leads nowhere from here on: otherwise the next file to be opened, the journal
    perhaps, would get its number, and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        buffered = io.BufferedWriter(_Patient(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=True))
