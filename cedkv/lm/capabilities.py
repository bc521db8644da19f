"""What a model can do, read from its configuration alone: what does not fit is refused before weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cedkv.config import Phase2Config
from cedkv.errors import ConfigError, ModelError

ROTATABLE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rope types whose angles do not depend on the sequence's length, so that a key can be moved by a rotation."""
INTERLEAVED = frozenset({"gptj", "codegen", "cohere", "cohere2", "glm", "glm4", "ernie4_5", "ernie4_5_moe", "helium"})
"""Architectures that rotate neighbouring pairs instead of halves."""
BACKWARDS = frozenset({"nanochat"})
"""Architectures that rotate halves by the negative angle."""


@dataclass(frozen=True)
class Capabilities:
    """Facts about a model that decide what can be asked of it."""

    model_type: str
    n_layers: int
    max_positions: int
    rope_type: str | None
    partial_rotary: bool


def read_capabilities(config: Any) -> Capabilities:
    """Read a Hugging Face configuration.

    Raises:
        ModelError: not a decoder with a plain key/value cache and rotary positions; says why and what would work.
    """
    kind = config.model_type
    works = "use a decoder with rotary positions and full attention in every layer (Llama, Qwen2, Qwen3, Mistral, ...)"

    def refuse(reason: str) -> ModelError:
        return ModelError(f"model type {kind!r} is refused: {reason}; {works}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder, its prompt is not a prefix of its cache")
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
        raise refuse("its configuration names no attention layers (a vision-language wrapper, or no transformer)")
    if getattr(config, "kv_lora_rank", None):
        raise refuse("its cache holds latent vectors (MLA), not keys and values by head")
    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_theta" not in rope or getattr(config, "alibi", False):
        raise refuse("its positions are not one rotary embedding, so kept keys cannot be placed")
    max_positions = int(config.max_position_embeddings)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layer_types - {"full_attention"} or (window and window < max_positions):
        raise refuse("some layers see a window or keep no keys, so a prefix would not be where it is put")
    return Capabilities(
        model_type=kind,
        n_layers=config.num_hidden_layers,
        max_positions=max_positions,
        rope_type=rope.get("rope_type", "default"),
        partial_rotary=rope.get("partial_rotary_factor", 1.0) != 1.0 or 0 in (getattr(config, "no_rope_layers", None) or ()),
    )


def require(capabilities: Capabilities, config: Phase2Config) -> None:
    """Refuse a configuration that this model cannot carry out.

    Raises:
        ModelError: what is asked for needs key rotation, which the model's positions do not allow.
        ConfigError: a layer that does not exist.
    """
    scope_layers(config.layer_scope.selection, capabilities.n_layers, "layer_scope.selection")
    scope_layers(config.layer_scope.injection, capabilities.n_layers, "layer_scope.injection")
    if config.prefix.kv_source == "gather" and config.injection.positioning_mode == "compact" and not can_rotate(capabilities):
        raise ModelError(
            f"prefix.kv_source=gather with injection.positioning_mode=compact moves keys by rotation, which is not "
            f"possible for model type {capabilities.model_type!r} (rope type {capabilities.rope_type!r}, "
            f"{'partial' if capabilities.partial_rotary else 'full'} rotary); use kv_source=prefill or "
            "positioning_mode=absolute"
        )


def can_rotate(capabilities: Capabilities) -> bool:
    """Whether keys in the cache can be moved by ``rotate_keys``."""
    return (
        capabilities.rope_type in ROTATABLE
        and not capabilities.partial_rotary
        and capabilities.model_type not in INTERLEAVED | BACKWARDS
    )


def scope_layers(scope: str | list[int], n_layers: int, key: str) -> frozenset[int]:
    """The layers of a scope: ``all``, ``topNN`` (the last ceil(NN % of n_layers)), or a list.

    Raises:
        ConfigError: a layer beyond the model's last.
    """
    if isinstance(scope, list):
        beyond = [layer for layer in scope if layer >= n_layers]
        if beyond:
            raise ConfigError(f"{key} names layer {beyond[0]}, the model's last is {n_layers - 1}; remove it")
        return frozenset(scope)
    share = 100 if scope == "all" else int(scope.removeprefix("top"))
    return frozenset(range(n_layers - math.ceil(share * n_layers / 100), n_layers))
