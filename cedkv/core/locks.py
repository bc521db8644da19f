"""Locks on files: held by one process, and released by the operating system when that process ends, however it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system answers that has no locks (NFS without its lock daemon, some network and FUSE file systems)."""


@contextmanager
def exclusive_lock(path: Path, timeout: float = -1) -> Iterator[bool]:
    """Hold a lock for this process alone, where the file system has locks; yield whether it is held.

    Args:
        path: the lock's file, which is made, and stays.
        timeout: longest wait for another process in seconds; negative: as long as that takes.

    Raises:
        filelock.Timeout: another process holds the lock.
        OSError: the file cannot be opened.
    """
    if not _has_locks(path):
        yield False
        return
    with FileLock(path, timeout=timeout):
        yield True


def _has_locks(path: Path) -> bool:
    """Ask the file system for a lock: what filelock makes of a refusal differs between its releases."""
    if os.name != "posix":
        return True
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in WITHOUT_LOCKS
    finally:
        os.close(descriptor)
    return True
