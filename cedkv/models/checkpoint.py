"""Where a checkpoint is, and whether its own code may run; decided before anything of it is loaded."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from cedkv.config.schema import ModelBlock
from cedkv.core.errors import ConfigError, ModelError

TRUST = "trust_remote_code"
"""The tag of runs that execute a checkpoint's own code: which code."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_pinned(model: ModelBlock, folder: Path | None) -> None:
    """Raise if ``model.trust_remote_code`` is set and the code that would run may change.

    Args:
        folder: the folder of a local model; None for a hub id.

    Raises:
        ConfigError: the revision of a hub model is not a full commit.
    """
    if model.trust_remote_code and folder is None and not _COMMIT.fullmatch(model.revision or ""):
        raise ConfigError(
            f"model.trust_remote_code = true runs code from {model.id!r}, and model.revision = {model.revision!r} may "
            "be other code tomorrow: set model.revision (-P model_revision) to the full commit you have read (40 hex digits)"
        )


def check_own_code(model: ModelBlock, content: dict[str, Any]) -> None:
    """Raise if ``model.trust_remote_code`` is set and the code comes from another repository, which no revision pins.

    Args:
        content: config.json as it is written.

    Raises:
        ModelError: names the repository.
    """
    classes = content.get("auto_map")
    foreign = [name for name in classes.values() if "--" in str(name)] if isinstance(classes, dict) else []
    if model.trust_remote_code and foreign:
        raise ModelError(
            f"{model.id}: its config.json takes code from another repository ({foreign[0]}), which model.revision does not "
            "pin; copy that code into a local folder with the model, and give the folder as model.id"
        )


def code_digest(folder: Path) -> str:
    """Return the sha256 over names and bytes of a folder's Python files: the code that ``trust_remote_code`` may run."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def local_folder(model: ModelBlock) -> Path | None:
    """Return the folder that ``model.id`` names; None for a hub id."""
    folder = Path(os.path.expanduser(model.id))
    return folder if os.path.isdir(folder) else None  # False, unlike Path.is_dir, for a name that no file can have


def trusted_code(model: ModelBlock) -> str | None:
    """Return which code of the checkpoint may run: a commit, or the digest of a folder's Python files; None if none may."""
    if not model.trust_remote_code:
        return None
    folder = local_folder(model)
    return str(model.revision) if folder is None else code_digest(folder)


def trust_tag(model: ModelBlock) -> dict[str, str]:
    """Return the tag of runs that execute a checkpoint's own code; empty if none is executed."""
    code = trusted_code(model)
    return {} if code is None else {TRUST: code}
