"""What a GGUF file's metadata says about a model, against the configuration that transformers makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_PLAIN = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""Key of the metadata, without the architecture -> the attribute of a configuration that means the same."""
_HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_WITHOUT_EFFECT = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")
"""Only other scalings than linear read the first two, and those are rejected; the third is where the weights came from."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1 and later have in common; the file gives only the resulting factors, against which these are checked."""
_GEMMA3_PERIOD = 6
"""Every sixth layer of Gemma 3 has no window; both llama.cpp and transformers have this number in their code."""
_GEMMA3_HEAD_DIM = 256
"""Gemma 3 divides scores by sqrt(256) in all sizes with heads of this size; the file does not say by what in the others."""


def complete(config: Any, architecture: str, metadata: Mapping[str, Any], factors: np.ndarray | None) -> None:
    """Put into a configuration what transformers leaves out: head size and scaled rotary embeddings.

    Args:
        config: as transformers reads it from the file; changed in place.
        factors: the tensor ``rope_freqs.weight``, by which each rotary frequency is divided (head size / 2); None without.
    """
    if hasattr(config, "head_dim"):
        config.head_dim = int(_stated(architecture, metadata)["attention.key_length"])
    rope = _full_rope(config)
    factor = float(metadata.get(f"{architecture}.rope.scaling.factor", 1.0))
    if factors is not None:
        rope.update({"rope_type": "llama3", "factor": float(np.max(factors)), **_LLAMA3})
    elif metadata.get(f"{architecture}.rope.scaling.type") == "linear" and factor != 1.0:
        rope.update({"rope_type": "linear", "factor": factor})


def check_metadata(config: Any, architecture: str, metadata: Mapping[str, Any], factors: np.ndarray | None) -> list[str]:
    """Return what the metadata says and the configuration does not, one sentence each; empty if nothing is lost."""
    prefix = f"{architecture}."
    said = _stated(architecture, metadata)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _full_rope(config)
    meant = {key: getattr(config, attribute) for key, attribute in _PLAIN.items()}
    meant |= dict.fromkeys(_HEAD_DIM, head_dim)
    meant |= {"rope.freq_base": rope["rope_theta"]}
    meant |= dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), rope.get("factor", 1.0))
    meant["rope.scaling.type"] = "none" if rope["rope_type"] == "default" else rope["rope_type"]
    if architecture == "gemma3":
        meant["attention.sliding_window"] = config.sliding_window
        meant["rope.freq_base_swa"] = config.rope_parameters["sliding_attention"]["rope_theta"]
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        listed = isinstance(said.get("attention.sliding_window_pattern"), list)
        meant["attention.sliding_window_pattern"] = sliding if listed else _GEMMA3_PERIOD
    lost = []
    for key, value in said.items():
        if key in meant:
            if not _same(value, meant[key]):
                lost.append(f"{prefix}{key} is {value!r}, and transformers reads {meant[key]!r}")
        elif key not in _WITHOUT_EFFECT and value not in (0, False, ""):
            lost.append(f"{prefix}{key} is {value!r}, which transformers drops")
    lost += [f"{prefix}{key} is missing" for key in sorted(_PLAIN.keys() - said.keys() - {"vocab_size"})]
    if config.model_type.removesuffix("_text") != architecture:
        lost.append(f"general.architecture is {architecture!r}, and transformers reads a {config.model_type!r}")
    if architecture == "gemma3" and head_dim != _GEMMA3_HEAD_DIM:
        lost.append(f"heads have {head_dim} dimensions, and by what scores are divided is known for {_GEMMA3_HEAD_DIM} only")
    if factors is not None and not np.allclose(_llama3_factors(config), factors, rtol=1e-3):
        lost.append("rope_freqs.weight scales rotary frequencies in another way than Llama 3.1 does")
    return lost


def _stated(architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys about the model, without the architecture; those that a file may leave out as llama.cpp reads them."""
    prefix = f"{architecture}."
    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    heads, width = said.get("attention.head_count", 1), said.get("embedding_length", 0)
    if isinstance(heads, int):
        said.setdefault("attention.key_length", width // heads)
    return {"attention.head_count_kv": heads, "rope.freq_base": 10000.0, **said}


def _full_rope(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of layers with full attention; changing them changes the configuration."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _llama3_factors(config: Any) -> np.ndarray:
    """Return by what ``config`` divides each rotary frequency, (head size / 2,)."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / _full_rope(config)["rope_theta"] ** (np.arange(0, size, 2) / size)
    return np.asarray(plain / scaled.numpy())


def _same(said: Any, meant: Any) -> bool:
    if isinstance(said, (int, float)) and isinstance(meant, (int, float)):
        return math.isclose(said, meant, rel_tol=1e-6)
    return bool(said == meant)
