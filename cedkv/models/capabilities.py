"""What a model supports, read from its configuration alone: an unsupported model is rejected before weights are loaded.

A model that is not known to give correct numbers is rejected, or limited to the lengths where the numbers are known to be
correct. What a configuration does not say (how keys are rotated, whether ``position_ids`` are honoured) is measured on the
loaded model, by ``rope_detection`` and by the certificate.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cedkv.config.extensions import KV_SOURCES, POSITIONING
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, ModelError
from cedkv.core.text import one_line
from cedkv.kv.positioning import moves_cached_keys

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"})
"""Supported RoPE types. Beyond the training length, the angles of ``dynamic`` and ``longrope`` change with the length of the
sequence, which cached keys cannot follow: such a model counts as one of its training length."""
LEARNED_POSITIONS = frozenset({"gpt2", "gpt_bigcode", "opt"})
"""Model types with a learned embedding per position, looked up by ``position_ids``."""
ALIBI_POSITIONS = frozenset({"bloom", "mpt"})
SPARSE_ATTENTION_SETTINGS = ("keep_window_size", "index_topk")
"""Settings that give a length beyond which layers choose by content which tokens they attend to."""
KV_LAYER_TYPES = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer types that cache keys and values per head, each with the setting that limits how far back it sees; None: no limit."""
LEAST_CONTEXT = 16
"""Tokens without which a model cannot be checked against itself: of its context, and of its vocabulary."""
SUPPORTED_HINT = (
    "use a decoder with rotary positions and keys and values in every layer (Llama, Qwen2, Qwen3, Mistral, Gemma, ...)"
)


@dataclass(frozen=True)
class ContextLimit:
    """The most tokens a sequence may have, prefix slots included, and the reason."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class Capabilities:
    """Facts about a model that decide which configurations it supports.

    positions: ``rotary`` keys can be moved by a rotation; ``learned`` positions are in the values too and cannot be moved.
    rope_types: the RoPE types that occur, none for learned positions.
    max_positions: the context length, or the length within which the RoPE angles do not change.
    context_limits: limits on prefix slots + tokens, from layers that do not see the whole sequence.
    heads, kv_heads: query heads per layer, and key/value heads per layer.
    softcap: cap of attention scores; None for no cap.
    """

    model_type: str
    n_layers: int
    positions: Literal["rotary", "learned"]
    rope_types: tuple[str, ...]
    max_positions: int
    context_limits: tuple[ContextLimit, ...]
    heads: int
    kv_heads: int
    softcap: float | None = None

    @property
    def context(self) -> int:
        """The most tokens that every layer sees, at positions that the model has."""
        return min([self.max_positions, *(limit.tokens for limit in self.context_limits)])

    @property
    def layout(self) -> str:
        """Name of the head layout: MHA, GQA or MQA."""
        return "MHA" if self.kv_heads == self.heads else "MQA" if self.kv_heads == 1 else "GQA"


def read_capabilities(config: Any) -> Capabilities:
    """Read the capabilities from a Hugging Face configuration.

    Raises:
        ModelError: not a decoder with a standard KV cache and explicit positions; names every problem and what would work.
    """
    try:
        problems = list(_problems(config))
    except Exception as error:  # a custom configuration class may raise anything
        problems = [("configuration", one_line(f"it cannot be read as that of a decoder: {error}"))]
    if problems:
        lines = "".join(f"\n  {aspect:<12}  {reason}" for aspect, reason in problems)
        raise ModelError(
            f"model type {config.model_type!r} is rejected before its weights are loaded:{lines}\n{SUPPORTED_HINT}"
        )
    rope_settings = list(_rope_settings(config))
    lengths = [config.max_position_embeddings]
    for rope in rope_settings:
        if rope["rope_type"] == "longrope":
            lengths.append(rope["original_max_position_embeddings"])
    capabilities = Capabilities(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        positions="learned" if config.model_type in LEARNED_POSITIONS else "rotary",
        rope_types=tuple(sorted({rope["rope_type"] for rope in rope_settings})),
        max_positions=int(min(lengths)),
        context_limits=tuple(_context_limits(config)),
        heads=config.num_attention_heads,
        kv_heads=_kv_heads(config),
        softcap=getattr(config, "attn_logit_softcapping", None),
    )
    if capabilities.context < LEAST_CONTEXT:
        raise ModelError(
            f"model type {config.model_type!r} is rejected before its weights are loaded: it sees {capabilities.context} "
            f"tokens, and {LEAST_CONTEXT} are needed to check it. {SUPPORTED_HINT}"
        )
    return capabilities


def _problems(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (aspect, reason) for everything that rules this model out."""
    if getattr(config, "is_encoder_decoder", False):
        yield "architecture", "an encoder-decoder: its prompt is not a prefix of its cache"
        return
    if config.get_text_config(decoder=True) is not config:
        yield "architecture", "a wrapper of several models (vision, audio, text); its text model by itself may work"
        return
    if config.model_type in CONFIG_MAPPING_NAMES and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield "architecture", "transformers has no language model of this type that predicts the next token"
        return
    if getattr(config, "is_heterogeneous", False):
        yield "layers", "they differ from each other in their sizes, so there is no one shape of keys and values"
        return
    if not isinstance(getattr(config, "num_hidden_layers", None), int) or not hasattr(config, "num_attention_heads"):
        yield "layers", "its configuration names no attention layers, so there are no keys and values to keep"
        return
    if getattr(config, "is_causal", True) is False:
        yield "attention", "tokens see later ones: what is cached would change with what follows"
    if getattr(config, "use_bidirectional_attention", None):
        yield "attention", "tokens see later ones (use_bidirectional_attention): what is cached would change with what follows"
    if getattr(config, "kv_lora_rank", None):
        yield "cache", "the cache holds latent vectors (MLA), not keys and values by head"
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        yield "cache", "some layers use the keys and values of others"
    yield from _size_problems(config)
    layer_types = Counter(_layer_types(config))
    without_kv = {name: n for name, n in layer_types.items() if name not in KV_LAYER_TYPES}
    if without_kv:
        count, names = sum(without_kv.values()), ", ".join(f"{n} x {name}" for name, n in sorted(without_kv.items()))
        yield "layers", f"{count} of {config.num_hidden_layers} layers keep something else than keys and values ({names})"
    if not _uses_attention_interface(config):
        yield "attention", "attention is computed inside the model, not by transformers' interface, so its rows cannot be read"
    yield from _position_problems(config)


def _size_problems(config: Any) -> Iterator[tuple[str, str]]:
    """Yield what no model can have: no layers, no heads, query heads that do not share key heads evenly, an empty window."""
    sizes = {"num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
    sizes["num_key_value_heads"] = _kv_heads(config)
    sizes["head_dim"] = getattr(config, "head_dim", None) or 1
    for name, size in sizes.items():
        if not _is_positive(size):
            yield "sizes", f"{name} = {size!r} is no size"
            return
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        yield (
            "sizes",
            f"{sizes['num_attention_heads']} query heads cannot share {sizes['num_key_value_heads']} key heads evenly",
        )
    layer_types = _layer_types(config)
    for layer_type, setting in KV_LAYER_TYPES.items():
        window = getattr(config, setting, None) if setting is not None else 1
        if (window is not None and not _is_positive(window)) or (window is None and layer_type in layer_types):
            yield "layers", f"{setting} = {window!r} is no window"


def _position_problems(config: Any) -> Iterator[tuple[str, str]]:
    if getattr(config, "alibi", False) or config.model_type in ALIBI_POSITIONS:
        yield "positions", "its positions are ALiBi, a penalty by distance in the cache: kept tokens cannot be placed"
        return
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        yield "positions", "its configuration names no context length (max_position_embeddings)"
    if config.model_type in LEARNED_POSITIONS:
        return
    rope_settings = list(_rope_settings(config))
    if not rope_settings:
        yield "positions", "its positions are neither rotary nor of another kind known here, so kept tokens cannot be placed"
    for rope in rope_settings:
        rope_type = rope.get("rope_type")
        if rope_type not in ROPE_TYPES:
            yield "positions", f"rope type {rope_type!r} is not known here (known: {', '.join(sorted(ROPE_TYPES))})"
        elif not _is_positive(rope.get("rope_theta")):
            yield "positions", f"rope_theta = {rope.get('rope_theta')!r} is no frequency base"
        elif (wrong := _wrong_factor(rope)) is not None:
            yield "positions", f"{wrong} = {rope[wrong]!r} is no factor of RoPE's angles"
        elif rope_type == "longrope" and not _is_positive(rope.get("original_max_position_embeddings")):
            yield "positions", "longrope without original_max_position_embeddings: where its angles change is not known"


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the RoPE settings: one for all layers, or one per layer type (None: layers of that type have no positions)."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in per_layer_type or ([parameters] if parameters.get("rope_theta") is not None else []):
        yield {"rope_type": rope.get("type", "default"), **rope}


def _wrong_factor(rope: dict[str, Any]) -> str | None:
    """Return the name of a setting that would make angles infinite, NaN or negative; None if there is none."""
    for name in ("factor", "partial_rotary_factor", "short_factor", "long_factor"):
        value = rope.get(name)
        if value is not None and not all(map(_is_positive, value if isinstance(value, list) else [value])):
            return name
    return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _layer_types(config: Any) -> list[str]:
    """Return the type of every layer; where the configuration lists none, the type that it implies for all."""
    listed = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if listed:
        return ["full_attention" if name == "attention" else str(name) for name in listed]
    implied = "full_attention"
    for name, setting in KV_LAYER_TYPES.items():
        if setting is not None and getattr(config, setting, None) and getattr(config, "use_sliding_window", True):
            implied = name
    return [implied] * config.num_hidden_layers


def _context_limits(config: Any) -> Iterator[ContextLimit]:
    layer_types = Counter(_layer_types(config))
    for name, setting in KV_LAYER_TYPES.items():
        size = getattr(config, setting, None) if setting is not None else None
        if layer_types[name] and size:
            reason = f"{layer_types[name]} of {config.num_hidden_layers} layers see {size} tokens ({setting})"
            yield ContextLimit(int(size) - 1, reason)
    for setting in SPARSE_ATTENTION_SETTINGS:
        size = getattr(config, setting, None)
        if isinstance(size, int) and size > 0:
            yield ContextLimit(size, f"layers choose what they see beyond {size} tokens ({setting})")


def _kv_heads(config: Any) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    given = getattr(config, "num_key_value_heads", None)
    return int(config.num_attention_heads if given is None else given)


def _uses_attention_interface(config: Any) -> bool:
    """Return whether the model computes attention through transformers' attention interface; True for unknown model code."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class.__module__.startswith("transformers_modules."):
        return True  # a checkpoint's own code, which transformers registers once it has run
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def unsupported_reason(capabilities: Capabilities, kv_source: str, positioning: str) -> str | None:
    """Return why K/V of this source cannot be placed like this; None if they can, as far as the configuration says.

    ``prefill`` runs tokens at their assigned positions and ``gather`` at ``absolute`` leaves keys where they are: both need
    only explicit positions. ``gather`` in any other mode moves keys, which only a rotation can do. ``layer_scope.injection``
    hides slots from layers, which the attention of ``kv.attention`` supports for every model.
    """
    if capabilities.positions != "rotary" and moves_cached_keys(kv_source, positioning):
        return f"it moves keys to other positions, and {capabilities.positions} positions cannot be moved"
    return None


def check_supported(capabilities: Capabilities, config: Phase2Config) -> None:
    """Raise if this model cannot carry out the configuration.

    Raises:
        ModelError: this model does not support the K/V source with the positioning; lists the supported combinations.
        ConfigError: a layer scope names a layer beyond the model's last.
    """
    scope_layers(config.layer_scope.selection, capabilities.n_layers, "layer_scope.selection")
    scope_layers(config.layer_scope.injection, capabilities.n_layers, "layer_scope.injection")
    kv_source, positioning = config.prefix.kv_source, config.injection.positioning_mode
    reason = unsupported_reason(capabilities, kv_source, positioning)
    if reason is not None:
        raise unsupported_error(capabilities, kv_source, positioning, reason)


def unsupported_error(capabilities: Capabilities, kv_source: str, positioning: str, reason: str) -> ModelError:
    """Return the error that rejects a K/V source with a positioning and lists the supported combinations."""
    lines = "".join(
        f"\n  prefix.kv_source={source:<8} injection.positioning_mode={mode:<9} "
        f"{'rejected' if (source, mode) == (kv_source, positioning) else _status(capabilities, source, mode)}"
        for source in KV_SOURCES.builtin
        for mode in POSITIONING.builtin
    )
    return ModelError(
        f"prefix.kv_source={kv_source} with injection.positioning_mode={positioning} is rejected for model type "
        f"{capabilities.model_type!r}: {reason}{lines}"
    )


def _status(capabilities: Capabilities, kv_source: str, positioning: str) -> str:
    return unsupported_reason(capabilities, kv_source, positioning) or "works"


def scope_layers(scope: str | Sequence[int], n_layers: int, key: str) -> frozenset[int]:
    """Return the layers of a scope: ``all``, ``topNN`` (the last ceil(NN % of n_layers)), ``midNN`` (as many in the middle, the
    earlier ones where that is uneven), or a list.

    Raises:
        ConfigError: the scope names a layer beyond the model's last.
    """
    if not isinstance(scope, str):
        beyond = [layer for layer in scope if layer >= n_layers]
        if beyond:
            raise ConfigError(f"{key} names layer {beyond[0]}, the model's last is {n_layers - 1}; remove it")
        return frozenset(scope)
    share = 100 if scope == "all" else int(scope[len("top") :])
    size = math.ceil(share * n_layers / 100)
    start = (n_layers - size) // 2 if scope.startswith("mid") else n_layers - size
    return frozenset(range(start, start + size))
