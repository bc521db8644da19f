"""What a checkpoint must hold, and whether code of its own may run; decided before anything of it is loaded."""

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
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def require_config(folder: Path) -> None:
    """Refuse a local folder that is no model's. Raises ModelError: no config.json, or none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is no model folder: it has no config.json (it holds {_names(folder)}). Give the folder that holds "
            "config.json, *.safetensors and tokenizer.json; a download may have stopped"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json cannot be read as JSON: {error}; download it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f'{folder}/config.json names no model: it needs a "model_type"; take the one of the checkpoint')


def require_weights(folder: Path) -> None:
    """Refuse a local folder without safetensors. Raises ModelError, with how to make them of what is there."""
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
    if others:
        raise ModelError(
            f"{folder} holds its weights as {others[0]} alone, and reading that runs what is in it: only safetensors "
            "are read. If you trust it, convert it where transformers is: "
            'm = AutoModelForCausalLM.from_pretrained("FOLDER", use_safetensors=False); m.save_pretrained("FOLDER")'
        )
    gguf = " GGUF files have to be converted first." if any(folder.glob("*.gguf")) else ""
    raise ModelError(f"{folder} holds no weights: it needs *.safetensors (it holds {_names(folder)}).{gguf} Download it whole")


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def require_trust(model: ModelBlock, folder: Path | None, written: Callable[[], dict[str, Any]]) -> None:
    """Refuse a checkpoint's own code, unless it is asked for and is pinned.

    Args:
        folder: of a local model; None for a hub id.
        written: gives config.json as it stands.

    Raises:
        ConfigError: the code is asked for, and which code that is may change.
        ModelError: it would come out of another repository, which no revision pins.
    """
    if not model.trust_remote_code:
        return
    if folder is None and not _COMMIT.fullmatch(model.revision or ""):
        raise ConfigError(
            f"model.trust_remote_code = true runs code out of {model.id!r}, and model.revision = {model.revision!r} may be "
            "other code tomorrow: set model.revision (-P model_revision) to the full commit you have read (40 hex digits)"
        )
    classes = written().get("auto_map")
    foreign = [name for name in classes.values() if "--" in str(name)] if isinstance(classes, dict) else []
    if foreign:
        raise ModelError(
            f"{model.id}: its config.json takes code out of another repository ({foreign[0]}), which model.revision does not "
            "pin; copy that code into a local folder with the model, and give the folder as model.id"
        )


def code_digest(folder: Path) -> str:
    """sha256 over names and bytes of a folder's Python files: what ``trust_remote_code`` has run from it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def local_folder(model: ModelBlock) -> Path | None:
    """The folder that ``model.id`` names; None for a hub id."""
    folder = Path(os.path.expanduser(model.id))
    return folder if folder.is_dir() else None


def trusted_code(model: ModelBlock) -> str | None:
    """Which code of the checkpoint's own may run: a commit, or the digest of a folder's Python files; None for none."""
    if not model.trust_remote_code:
        return None
    folder = local_folder(model)
    return str(model.revision) if folder is None else code_digest(folder)


def trust_tag(model: ModelBlock) -> dict[str, str]:
    """The tag of runs that execute a checkpoint's own code."""
    code = trusted_code(model)
    return {} if code is None else {"trust_remote_code": code}
