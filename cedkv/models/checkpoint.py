"""What a checkpoint must contain, and whether its own code may run; decided before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cedkv.config.schema import ModelBlock
from cedkv.core.errors import ConfigError, ModelError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weight files that run code when they are read."""


def check_config(folder: Path) -> None:
    """Raise if a local folder holds no model configuration.

    Raises:
        ModelError: config.json is missing, unreadable, or names no model type.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json (it holds {_names(folder)}). Give the folder that holds "
            f"config.json, *.safetensors and tokenizer.json; a download may have stopped.{_gguf_hint(folder)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json cannot be read as JSON: {error}; download it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f'{folder}/config.json names no model: it needs a "model_type"; take the one of the checkpoint')


def check_weights(folder: Path) -> None:
    """Raise if a local folder holds no safetensors.

    Raises:
        ModelError: no safetensors; says how to convert the weights that the folder holds instead.
    """
    if any(folder.glob("*.safetensors")):
        return
    unsafe = sorted(path.name for pattern in _UNSAFE_WEIGHTS for path in folder.glob(pattern))
    if unsafe:
        raise ModelError(
            f"{folder} holds its weights only as {unsafe[0]}, and reading that file runs code in it: only safetensors "
            "are read. If you trust the file, convert it with transformers: "
            'm = AutoModelForCausalLM.from_pretrained("FOLDER", use_safetensors=False); m.save_pretrained("FOLDER")'
        )
    raise ModelError(
        f"{folder} holds no weights: it needs *.safetensors (it holds {_names(folder)}). Download the complete folder."
        f"{_gguf_hint(folder)}"
    )


def _gguf_hint(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    return f" For the model in a GGUF file give the file itself: -P model_id={files[0]}" if files else ""


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def check_trust(model: ModelBlock, folder: Path | None, read_config: Callable[[], dict[str, Any]]) -> None:
    """Raise if ``model.trust_remote_code`` is set and the code that would run is not pinned.

    Args:
        folder: the folder of a local model; None for a hub id.
        read_config: returns the unprocessed content of config.json.

    Raises:
        ConfigError: the revision of a hub model is not a full commit, so its code may change.
        ModelError: the code comes from another repository, which ``model.revision`` does not pin.
    """
    if not model.trust_remote_code:
        return
    if folder is None and not _COMMIT.fullmatch(model.revision or ""):
        raise ConfigError(
            f"model.trust_remote_code = true runs code from {model.id!r}, and model.revision = {model.revision!r} may "
            "be other code tomorrow: set model.revision (-P model_revision) to the full commit you have read (40 hex digits)"
        )
    classes = read_config().get("auto_map")
    foreign = [name for name in classes.values() if "--" in str(name)] if isinstance(classes, dict) else []
    if foreign:
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
    return folder if folder.is_dir() else None


def trusted_code(model: ModelBlock) -> str | None:
    """Return which code of the checkpoint may run: a commit, or the digest of a folder's Python files; None if none may."""
    if not model.trust_remote_code:
        return None
    folder = local_folder(model)
    return str(model.revision) if folder is None else code_digest(folder)


def trust_tag(model: ModelBlock) -> dict[str, str]:
    """Return the tag of runs that execute a checkpoint's own code; empty if none is executed."""
    code = trusted_code(model)
    return {} if code is None else {"trust_remote_code": code}
