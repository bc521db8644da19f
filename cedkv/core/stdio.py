"""Let a run continue when the reader of stdout or stderr goes away (``| head``, a full disk under the log)."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _TolerantStream(io.FileIO):
    """A standard stream that drops output it cannot write; the run's files hold the same output."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def tolerate_closed_streams() -> None:
    """Make the standard streams tolerate write errors; call this before any file is opened.

    A stream that is closed at the start (``>&-``) is redirected to the null device: otherwise the next opened file, perhaps
    the journal, would get the stream's descriptor and with it everything that libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        buffered = io.BufferedWriter(_TolerantStream(descriptor, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=True))
