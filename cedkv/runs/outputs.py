"""Where runs are stored: the folder of their folders, each held by one process, and what to do where it cannot be written."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import click
from filelock import Timeout

from cedkv.core.errors import ConfigError, RunInterrupted
from cedkv.core.locks import exclusive_lock
from cedkv.core.text import preview

OUTPUTS = Path("outputs")
"""The folder of runs where no other one is named: in the working folder."""
LOCK = "run.lock"
VARIABLE = "CEDKV_OUTPUTS"
"""Environment variable that names the folder of runs, absolute or from the working folder on."""
_MADE_BY_MKDTEMP = re.compile(r"tmp[a-z0-9_]{8}")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_FAILED = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISKS = (*_FULL, *_FAILED, *_NO_SYNC, errno.EROFS, errno.EFBIG)
_REMEDIES = {
    "free space": (errno.ENOSPC,),
    "free space of your quota": (errno.EDQUOT,),
    "mount its file system writable, which is read-only now": (errno.EROFS,),
    "give this user the right to write there": (errno.EACCES, errno.EPERM),
    "put a folder in its place": (errno.EEXIST, errno.ENOTDIR, errno.ELOOP),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "raise the limit of a file's size (ulimit -f)": (errno.EFBIG,),
    "bring back the disk, or the connection to it, which failed": _FAILED,
    f"use a file system that can flush files to disk (set {VARIABLE} to a folder there)": _NO_SYNC,
}
_REMEDY_OF = {number: remedy for remedy, numbers in _REMEDIES.items() for number in numbers}


def outputs_folder() -> Path:
    """Return the folder that holds the folders of runs: the one that ``CEDKV_OUTPUTS`` names, else ``OUTPUTS``.

    In a temporary folder (``is_temporary``) its path is absolute, so that whatever is said of a run says where it is.
    """
    folder = Path(os.environ.get(VARIABLE) or OUTPUTS).expanduser()
    return folder.absolute() if is_temporary(folder) else folder


def is_temporary(folder: Path) -> bool:
    """Return whether a folder lies in a temporary one, as ``mlflow run`` makes for a project that it fetches (git, zip).

    MLflow fetches into a folder of ``tempfile.mkdtemp`` and starts the project there, with its run in ``MLFLOW_RUN_ID``.
    """
    inside = Path(os.path.realpath(tempfile.gettempdir()))
    parts = Path(os.path.realpath(folder)).parts
    depth = len(inside.parts)
    return (
        "MLFLOW_RUN_ID" in os.environ
        and parts[:depth] == inside.parts
        and len(parts) > depth
        and _MADE_BY_MKDTEMP.fullmatch(parts[depth]) is not None
    )


def write_remedy(error: OSError) -> str:
    """Return what to do where a file of a run cannot be written, as part of a message."""
    return _REMEDY_OF.get(error.errno or 0, "make it writable")


def unwritable(error: OSError, folder: Path) -> str | None:
    """Return what cannot be written, if that is what an error in the middle of a run says; None for any other error.

    An error of ``write`` or ``fsync`` names no file: where it says that a disk is full or fails, it is the run's.

    Args:
        folder: the folder of the run.
    """
    if not isinstance(error.filename, str | bytes):
        return str(folder) if error.errno in _OF_DISKS else None
    name = os.fsdecode(error.filename)
    if Path(os.path.realpath(name)).is_relative_to(os.path.realpath(folder.parent)):  # nested runs lie beside their parent
        return str(folder)
    return name if error.errno in _FULL else None


def require_outputs() -> None:
    """Raise RunInterrupted when the folder of runs cannot be written, before a run without a place for results is created."""
    folder = outputs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise RunInterrupted(f"{folder.absolute()} cannot be written: {error}; {_or_elsewhere(error)}") from None


def _or_elsewhere(error: OSError) -> str:
    return f"{write_remedy(error)}, or set {VARIABLE} to another folder"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process alone; the operating system releases it when the process ends, however it ends.

    A file system without locks is named, and the run goes on: a second process on the same run is then the user's to avoid.

    Raises:
        ConfigError: another process holds the folder.
        RunInterrupted: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(exclusive_lock(folder / LOCK, timeout=0))
        except Timeout:
            raise ConfigError(
                f"run {folder.name} is in use by another process: two would mix their results. Wait for that process, or stop "
                "it, then try again"
            ) from None
        except OSError as error:
            raise RunInterrupted(f"{preview(str(folder), 200)} cannot be written: {error}; {_or_elsewhere(error)}") from None
        if not held:
            _warn_without_locks(folder.parent)
        yield


@cache
def _warn_without_locks(home: Path) -> None:
    click.echo(
        f"warning: the file system of {home.absolute()} has no locks, so that nothing keeps a second process off a run: two "
        "would mix their results. Resume or sync a run only when its process has ended",
        err=True,
    )
