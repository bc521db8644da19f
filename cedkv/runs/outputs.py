"""Where runs are stored: the folder that holds the folders of runs, and what to do where it cannot be written."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

OUTPUTS = Path("outputs")
"""The folder of runs where no other one is named: in the working folder."""
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
