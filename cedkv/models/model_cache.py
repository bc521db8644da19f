"""Folders of converted models: made once under a lock, put in place by one rename, and checked against a manifest at each use.

A file that has not been written since its digest was last checked is not read again for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cedkv.core.errors import ConfigError, ModelError
from cedkv.core.files import write_text
from cedkv.core.locks import exclusive_lock

TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
MODEL_FILES = (*TOKENIZER_FILES, "model.safetensors")
_MANIFEST = "manifest.json"
_CHECKED = "checked.json"
"""File name -> its state when its digest was checked."""
SETTLED = 2.0
"""Seconds after which a change of a file shows in its times, whatever their resolution."""
_log = logging.getLogger(__name__)


def cache_root(setting: str | None) -> Path:
    """Return the folder for converted weights: the setting, else ``$XDG_CACHE_HOME/cedkv``, else ``~/.cache/cedkv``.

    Raises:
        ConfigError: no setting, no XDG_CACHE_HOME and no home folder.
    """
    if setting:
        return Path(os.path.expanduser(setting))
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "cedkv"
    except RuntimeError:  # no HOME, and a user id without a name, as in containers
        raise ConfigError("no folder for caches: HOME is not set; set it, or XDG_CACHE_HOME, or model.cache_dir") from None


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_folder(
    cache_dir: str | None,
    name: str,
    gguf_sha256: str,
    files: tuple[str, ...],
    needed: int,
    make: Callable[[Path], Mapping[str, Any]],
) -> Path:
    """Return the folder of a converted model; make it if it is missing or damaged.

    Args:
        cache_dir: ``model.cache_dir``.
        name: the folder's name in the cache.
        gguf_sha256: digest of the GGUF file that the folder is made from.
        files: names of the files that ``make`` writes.
        needed: bytes on disk that ``make`` needs.
        make: fills an empty folder, whose parent is a scratch folder, and returns facts that the manifest keeps.

    Raises:
        ModelError: the cache folder cannot be used, or has too little space; errors of ``make`` are passed on.
    """
    root = cache_root(cache_dir)
    target = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root / f"{name}.lock"):
            if target.exists() and not _verified(target, gguf_sha256, files):
                damaged = Path(tempfile.mkdtemp(prefix=f"{name}-damaged-", dir=root)) / "files"
                _log.warning("%s does not match its manifest: moved to %s, converting again", target, damaged)
                target.rename(damaged)
            if not target.exists():
                _check_space(root, name, needed)
                with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root) as scratch:
                    made = Path(scratch) / "converted"
                    made.mkdir()
                    facts = make(made)
                    digests = {file: sha256(made / file) for file in files}
                    manifest = {**facts, "gguf_sha256": gguf_sha256, "files": digests}
                    (made / _MANIFEST).write_text(json.dumps(manifest, indent=1))
                    os.replace(made, target)
    except OSError as error:
        raise ModelError(
            f"the cache folder {root} cannot be used: {error}; set model.cache_dir or XDG_CACHE_HOME to a folder with "
            f"{_gigabytes(needed)} of free space"
        ) from error
    return target


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder that ``cached_folder`` returned."""
    content: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    return content


def _verified(target: Path, gguf_sha256: str, files: tuple[str, ...]) -> bool:
    try:
        manifest, checked = manifest_of(target), _checked(target)
        states = {name: _state(target / name) for name in files}
        changed = [name for name in files if checked.get(name) != states[name]]
        if manifest["gguf_sha256"] != gguf_sha256 or any(sha256(target / n) != manifest["files"][n] for n in changed):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if changed and all(time.time() - state["changed"] / 1e9 > SETTLED for state in states.values()):
        with suppress(OSError):  # the folder is another user's
            write_text(target / _CHECKED, json.dumps(states))
    return True


def _checked(target: Path) -> dict[str, Any]:
    """Return the states of files whose digests were right; none where they cannot be read."""
    try:
        content = json.loads((target / _CHECKED).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _state(path: Path) -> dict[str, int]:
    """Return what differs once a file has been written, or is another one; users cannot set the time of the last change."""
    stat = path.stat()
    return {"bytes": stat.st_size, "written": stat.st_mtime_ns, "changed": stat.st_ctime_ns, "inode": stat.st_ino}


def _check_space(root: Path, name: str, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ModelError(
            f"{name} needs {_gigabytes(needed)} of disk space in {root}, which has {_gigabytes(free)} free: nothing was "
            "converted. Free some, or set model.cache_dir or XDG_CACHE_HOME to a folder with more"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"
