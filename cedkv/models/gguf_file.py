"""Read what a GGUF file says about its model; reject by name what is no complete file of a supported model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cedkv.core.errors import ModelError
from cedkv.core.text import one_line

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_BLOCK = tuple(
    f"{part}.weight"
    for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
)
TENSORS = {
    "llama": _BLOCK,
    "qwen2": (*_BLOCK, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": (*_BLOCK, "attn_q_norm.weight", "attn_k_norm.weight"),
    "gemma3": (*_BLOCK, "attn_q_norm.weight", "attn_k_norm.weight", "post_attention_norm.weight", "post_ffw_norm.weight"),
}
"""Supported ``general.architecture`` -> the tensors of every layer, all of which the file must have."""
_KINDS = "Llama, Qwen2, Qwen3 and Gemma 3"
_OPTIONAL = {"output.weight", "rope_freqs.weight"}
INSTEAD = "Take the folder of the original model (config.json, *.safetensors, tokenizer.json), or another model"


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about its model.

    metadata: every key with its value; arrays as lists.
    tensors: as ``gguf.GGUFReader`` gives them; their data is read from the file when it is used.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[Any, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty if the file does not say it."""
        return str(self.metadata.get("general.architecture", ""))

    def facts(self) -> dict[str, Any]:
        """Return what reports say about the file: bytes, parameters, architecture, and how its weights are quantised."""
        from gguf import LlamaFileType

        number = self.metadata.get("general.file_type")
        known = number in set(LlamaFileType)
        return {
            "bytes": self.path.stat().st_size,
            "parameters": sum(int(tensor.n_elements) for tensor in self.tensors),
            "architecture": self.architecture,
            "quantisation": LlamaFileType(number).name.removeprefix("MOSTLY_") if known else None,
            "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in self.tensors).most_common()),
        }


def gguf_path(model_id: str) -> Path | None:
    """Return the file that ``model.id`` names; None where it is a hub id or a folder."""
    path = Path(os.path.expanduser(model_id))
    if os.path.isdir(path):  # False, unlike Path.is_dir, for a name that no file can have
        return None
    return path if os.path.isfile(path) or path.suffix.lower() == _SUFFIX else None


def read(path: Path) -> GgufFile:
    """Read metadata and the table of tensors.

    Raises:
        ModelError: no complete GGUF file, or not a model that is supported.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"{path} is read with the package gguf, which cannot be imported here: pip install 'cedkv[gguf]'")
    file = _parse(path)
    _check_kind(file)
    _check_tensors(file)
    return file


def require_file(path: Path) -> None:
    """Raise a ModelError if a path that names a GGUF file leads to none, or to one that cannot be read."""
    if not path.is_file():
        raise ModelError(
            f"model.id = {str(path)!r} names a GGUF file, and there is none; check the path (a hub repository of GGUF files is "
            "no model: download one file of it and give its path)"
        )
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ModelError(
            f"model.id = {str(path)!r} names a GGUF file that cannot be read: {error}; change its rights, or take a real file"
        ) from None


def _parse(path: Path) -> GgufFile:
    from gguf import GGUFReader

    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: its {size} bytes begin with {magic!r}, not {_MAGIC!r}. Give a GGUF file, or the "
            "folder that holds config.json and *.safetensors; a clone without git-lfs has pointers, and a download may be a "
            "web page"
        )
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = tuple(reader.tensors)
        end = max((tensor.data_offset + tensor.n_bytes for tensor in tensors), default=reader.data_offset)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise _damaged(path, f"it has {size} bytes, and reading it ends with: {one_line(error)}") from error
    if size < end:
        raise _damaged(path, f"it has {size} bytes, and its tensors end at byte {end}")
    return GgufFile(path, metadata, tensors)


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} cannot be read as GGUF (version 2 or 3): {reason}. The file is cut short or damaged, or of another version; "
        "download it again, or convert the model anew with llama.cpp's convert_hf_to_gguf.py"
    )


def _check_kind(file: GgufFile) -> None:
    path, metadata = file.path, file.metadata
    pieces = int(metadata.get("split.count", 1))
    if pieces > 1:
        raise ModelError(
            f"{path} is one of {pieces} pieces of a model, and only whole files are read: merge them with llama.cpp, "
            "llama-gguf-split --merge FIRST_PIECE OUT.gguf, and give OUT.gguf"
        )
    if metadata.get("general.type", "model") != "model":
        raise ModelError(f"{path} holds no model but {metadata['general.type']!r} (general.type); give the file of the model")
    if file.architecture not in TENSORS:
        raise ModelError(
            f"{path} has the architecture {file.architecture!r} (general.architecture), and GGUF files are read for "
            f"{', '.join(TENSORS)} ({_KINDS}) only: nothing was converted. {INSTEAD}"
        )


def _check_tensors(file: GgufFile) -> None:
    """Reject a file that lacks a tensor, has one that transformers would drop, or one of a type that is not dequantised."""
    layers = int(file.metadata.get(f"{file.architecture}.block_count", 0))
    names = {tensor.name for tensor in file.tensors}
    parts = TENSORS[file.architecture]
    required = {"token_embd.weight", "output_norm.weight", *(f"blk.{n}.{part}" for n in range(layers) for part in parts)}
    for what, wrong in (("lacks", required - names), ("has, beside what the model knows,", names - required - _OPTIONAL)):
        if wrong:
            raise ModelError(
                f"{file.path} {what} {len(wrong)} tensors for {layers} layers of {file.architecture}, such as "
                f"{', '.join(sorted(wrong)[:3])}: the model would not be the one of the file. {INSTEAD}"
            )
    tokens = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    rows = next(int(tensor.shape[-1]) for tensor in file.tensors if tensor.name == "token_embd.weight")
    said = file.metadata.get(f"{file.architecture}.vocab_size", tokens)
    if not tokens == rows == said:
        raise ModelError(
            f"{file.path} has a vocabulary of {tokens} tokens (vocab_size: {said}) and embeddings for {rows}: they belong to "
            f"different models. {INSTEAD}"
        )
    for kind in sorted({tensor.tensor_type for tensor in file.tensors}):
        if not _can_dequantise(kind):
            raise ModelError(
                f"{file.path} has tensors of type {kind.name}, which the package gguf cannot dequantise: nothing was "
                "converted. Take a file of another quantisation (Q4_K_M, Q8_0, F16), or the folder of the original model"
            )


def _can_dequantise(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
