"""How large a model is in memory, from its configuration alone: it is built on torch's meta device, which holds no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cedkv.models.devices import is_here, sum_dtype
from cedkv.models.opening import ModelSpec


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    parameters: numbers in its weights; tied ones count once.
    weight_bytes: its weights in memory; None where they are quantised and not in a local folder.
    kv_bytes: keys and values of one token, of all layers.
    heads: attention heads of all layers.
    hidden, intermediate, vocabulary: numbers of a token's hidden state, inside a feed-forward layer, and of its logits.
    number_bytes: bytes of a number in the dtype.
    distribution_bytes: of a number in a distribution over the vocabulary (``sum_dtype``); of a card that is not here the most.
    """

    parameters: int
    weight_bytes: int | None
    kv_bytes: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    number_bytes: int
    distribution_bytes: int


def model_sizes(spec: ModelSpec, torch_dtype: str) -> ModelSizes:
    """Return the sizes of a model that runs in a dtype."""
    model, number_bytes = spec.skeleton, getattr(torch, torch_dtype).itemsize
    config = model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelSizes(
        parameters,
        _stored_bytes(spec) if spec.quantised is not None else parameters * number_bytes,
        2 * spec.capabilities.n_layers * spec.capabilities.kv_heads * head_dim * number_bytes,
        spec.capabilities.n_layers * heads,
        hidden,
        int(getattr(config, "intermediate_size", None) or 4 * hidden),
        spec.vocabulary,
        number_bytes,
        (sum_dtype(spec.device) if spec.device.type != "cuda" or is_here(spec.device) else torch.float64).itemsize,
    )


def _stored_bytes(spec: ModelSpec) -> int | None:
    """Return the bytes of a local folder's safetensors, as quantised weights stay in memory; None for a hub id."""
    return sum(file.stat().st_size for file in Path(spec.source).glob("*.safetensors")) or None
