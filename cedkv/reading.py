"""Files that the user names: regular ones, of a sane size, as UTF-8. A pipe would be waited for, a device has no end."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def given_file(path: Path, most: int | None = None) -> Iterator[TextIO]:
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
