"""A model from one GGUF file: read by transformers, dequantised once to float32 safetensors, kept by the file's digest.

transformers reads the weights and part of the metadata; it drops the rest without a word. What it drops is either put into the
configuration here (head size, scaled rotary embeddings), or the file is rejected, by the name of what would be lost. Rejections
come before anything is converted.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cedkv.core.errors import ModelError
from cedkv.core.text import one_line
from cedkv.models import gguf_tokenizer
from cedkv.models.gguf_config import check_metadata, complete
from cedkv.models.gguf_file import INSTEAD, GgufFile, read, require_file
from cedkv.models.model_cache import MODEL_FILES, TOKENIZER_FILES, cached_folder, manifest_of, sha256

_FORMAT = "v1"
_SPARE = 200_000_000
"""Bytes on disk for the tokenizer and what is written beside the weights."""
_log = logging.getLogger(__name__)


def tokenizer_folder(path: Path, cache_dir: str | None) -> Path:
    """Return the folder with the file's configuration and tokenizer; no weights are read for it.

    Raises:
        ModelError: the file cannot be read, or its model is not supported; says why, and what to do.
    """
    require_file(path)
    digest = sha256(path)

    def make(folder: Path) -> dict[str, Any]:
        file = read(path)
        return {"source": file.facts(), "tokenizer": convert_tokenizer(file, folder, config_of(file))}

    return cached_folder(cache_dir, f"{_name(digest)}-tokenizer", digest, TOKENIZER_FILES, _SPARE, make)


def model_folder(path: Path, cache_dir: str | None) -> Path:
    """Return the folder with the whole model; weights are converted the first time. Errors as for ``tokenizer_folder``."""
    beside = tokenizer_folder(path, cache_dir)
    facts = facts_of(beside)
    digest, needed = facts["sha256"], 4 * facts["parameters"] + _SPARE

    def make(folder: Path) -> dict[str, Any]:
        file = read(path)
        _log.warning("Converting %s to float32 safetensors (once)", path.name)
        convert_weights(file, folder, config_of(file))
        for name in TOKENIZER_FILES:
            if name != "config.json":
                shutil.copyfile(beside / name, folder / name)
        return {"source": file.facts()}

    return cached_folder(cache_dir, _name(digest), digest, MODEL_FILES, needed, make)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return ``GgufFile.facts`` of the file that a folder was made from, with the file's sha256."""
    manifest = manifest_of(folder)
    return {**manifest["source"], "sha256": manifest["gguf_sha256"]}


def check_tokenizer(path: Path, folder: Path, tokenizer: Any) -> None:
    """Raise a ModelError if a tokenizer loaded from ``tokenizer_folder`` is not the one that was made from the file."""
    gguf_tokenizer.check_tokenizer(str(path), tokenizer, manifest_of(folder)["tokenizer"])


def convert_weights(file: GgufFile, folder: Path, config: Any) -> None:
    """Write a model's weights, dequantised to float32, and its configuration.

    Args:
        config: as ``config_of`` returns it.

    Raises:
        ModelError: transformers cannot read the file, or finds no weight for some part of the model.
    """
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            file.path.parent, gguf_file=file.path.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, KeyError, NotImplementedError, ImportError, RuntimeError) as error:
        raise ModelError(f"{file.path}: transformers cannot read this GGUF file: {one_line(error)}. {INSTEAD}") from error
    if info["missing_keys"]:
        raise ModelError(
            f"{file.path} has no weights for {sorted(info['missing_keys'])[:3]}: they would be random numbers. {INSTEAD}"
        )
    # The loaded model counts as quantised and cannot be saved; its weights are float32 already.
    with torch.device("meta"):
        clean = type(loaded)(type(loaded.config).from_dict(_settings(loaded.config)))
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.save_pretrained(folder, max_shard_size="1TB")


def convert_tokenizer(file: GgufFile, folder: Path, config: Any) -> dict[str, Any]:
    """Write a model's tokenizer and its configuration; return what ``check_tokenizer`` compares with.

    Raises:
        ModelError: a tokenizer that is not supported, or that does not reproduce a text.
    """
    prefix = "tokenizer."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    tokenizer = gguf_tokenizer.build_tokenizer(str(file.path), file.architecture, values)
    facts = gguf_tokenizer.tokenizer_facts(str(file.path), tokenizer)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    config.save_pretrained(folder)
    return facts


def config_of(file: GgufFile) -> Any:
    """Return the configuration of a file's model, as transformers reads it, with what transformers leaves out.

    Raises:
        ModelError: the metadata says something that the configuration cannot.
    """
    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{file.path}: transformers cannot read the metadata: {one_line(error)}. {INSTEAD}") from error
    factors = next((tensor.data for tensor in file.tensors if tensor.name == "rope_freqs.weight"), None)
    complete(config, file.architecture, file.metadata, factors)
    lost = check_metadata(config, file.architecture, file.metadata, factors)
    if lost:
        raise ModelError(
            f"{file.path} is rejected before anything is converted: {'; '.join(lost[:4])}. The model would not be the one of "
            f"the file. {INSTEAD}"
        )
    return config


def _settings(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] = config.to_dict()
    settings.pop("quantization_config", None)
    return settings


def _name(digest: str) -> str:
    return f"gguf-{digest[:32]}-{_FORMAT}"
