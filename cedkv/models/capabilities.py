"""What a model can do, read from its configuration alone: what does not fit is refused before weights are loaded.

What is not known to be right is refused, or allowed no further than it is known to be right; what a configuration does not
say (how keys are rotated, whether the positions given are honoured) is measured on the loaded model, by ``turns`` and by the
certificate.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, ModelError

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"})
"""Rope types that are known. The angles of ``dynamic`` and ``longrope`` change with the sequence's length beyond the one
they were trained with, which no key in a cache can follow: such a model is taken as one of that length."""
LEARNED = frozenset({"gpt2", "gpt_bigcode", "opt"})
"""Model types with a learned embedding for each position, which they look up by the position they are given."""
ALIBI = frozenset({"bloom", "mpt"})
SPARSE_BEYOND = ("keep_window_size", "index_topk")
"""Settings of a length beyond which layers choose what they see by content."""
LAYERS_WITH_KEYS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer types that keep keys and values by head, each with the setting that says how far back it sees; None: all."""
WORKS = "use a decoder with rotary positions and keys and values in every layer (Llama, Qwen2, Qwen3, Mistral, Gemma, ...)"


@dataclass(frozen=True)
class ContextLimit:
    """How many tokens a sequence may have, prefix slots included, and what says so."""

    tokens: int
    what: str


@dataclass(frozen=True)
class Capabilities:
    """Facts about a model that decide what can be asked of it.

    positions: ``rotary`` keys can be moved by a rotation; ``learned`` positions are in the values too, and cannot.
    rope_types: those that occur, none for learned positions.
    max_positions: the model's context length, or the length within which its angles do not change.
    reaches: limits on prefix slots + tokens, of layers that do not see all.
    heads, kv_heads: of queries, and of keys and values.
    """

    model_type: str
    n_layers: int
    positions: Literal["rotary", "learned"]
    rope_types: tuple[str, ...]
    max_positions: int
    reaches: tuple[ContextLimit, ...]
    heads: int
    kv_heads: int

    @property
    def layout(self) -> str:
        """MHA, GQA or MQA."""
        return "MHA" if self.kv_heads == self.heads else "MQA" if self.kv_heads == 1 else "GQA"


def read_capabilities(config: Any) -> Capabilities:
    """Read a Hugging Face configuration.

    Raises:
        ModelError: not a decoder with a plain key/value cache and positions that can be given; says all that does not fit,
            and what would work.
    """
    try:
        problems = list(_problems(config))
    except Exception as error:  # what a configuration class of its own may raise when it is asked
        problems = [("configuration", " ".join(f"it cannot be read as that of a decoder: {error}".split())[:200])]
    if problems:
        rows = "".join(f"\n  {what:<12}  {why}" for what, why in problems)
        raise ModelError(f"model type {config.model_type!r} is refused before its weights are loaded:{rows}\n{WORKS}")
    ropes = list(_ropes(config))
    lengths = [config.max_position_embeddings]
    for rope in ropes:
        if rope["rope_type"] == "longrope":
            lengths.append(rope["original_max_position_embeddings"])
    return Capabilities(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        positions="learned" if config.model_type in LEARNED else "rotary",
        rope_types=tuple(sorted({rope["rope_type"] for rope in ropes})),
        max_positions=int(min(lengths)),
        reaches=tuple(_reaches(config)),
        heads=config.num_attention_heads,
        kv_heads=_kv_heads(config),
    )


def _problems(config: Any) -> Iterator[tuple[str, str]]:
    """(what, why) of all that keeps this model from being used at all."""
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
    kinds = Counter(_layer_types(config))
    without = {kind: n for kind, n in kinds.items() if kind not in LAYERS_WITH_KEYS}
    if without:
        named = ", ".join(f"{n} x {kind}" for kind, n in sorted(without.items()))
        yield (
            "layers",
            f"{sum(without.values())} of {config.num_hidden_layers} layers keep something else than keys and values ({named})",
        )
    if not _open_attention(config):
        yield "attention", "attention is computed inside the model, not by transformers' interface, so its rows cannot be read"
    yield from _position_problems(config)


def _position_problems(config: Any) -> Iterator[tuple[str, str]]:
    if getattr(config, "alibi", False) or config.model_type in ALIBI:
        yield "positions", "its positions are ALiBi, a penalty by distance in the cache: kept tokens cannot be placed"
        return
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        yield "positions", "its configuration names no context length (max_position_embeddings)"
    if config.model_type in LEARNED:
        return
    ropes = list(_ropes(config))
    if not ropes:
        yield "positions", "its positions are neither rotary nor of another kind known here, so kept tokens cannot be placed"
    for rope in ropes:
        kind = rope.get("rope_type")
        if kind not in ROPE_TYPES:
            yield "positions", f"rope type {kind!r} is not known here (known: {', '.join(sorted(ROPE_TYPES))})"
        elif not _positive(rope.get("rope_theta")):
            yield "positions", f"rope_theta = {rope.get('rope_theta')!r} is no frequency base"
        elif kind == "longrope" and not _positive(rope.get("original_max_position_embeddings")):
            yield "positions", "longrope without original_max_position_embeddings: where its angles change is not known"


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings: one for all layers, or one a layer type (None: such layers have no positions)."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return
    nested = [value for value in found.values() if isinstance(value, dict)]
    for rope in nested or ([found] if found.get("rope_theta") is not None else []):
        yield {"rope_type": rope.get("type", "default"), **rope}


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _layer_types(config: Any) -> list[str]:
    """The type of every layer; where the configuration has no list, what it implies."""
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if named:
        return ["full_attention" if kind == "attention" else str(kind) for kind in named]
    implied = "full_attention"
    for kind, setting in LAYERS_WITH_KEYS.items():
        if setting is not None and getattr(config, setting, None) and getattr(config, "use_sliding_window", True):
            implied = kind
    return [implied] * config.num_hidden_layers


def _reaches(config: Any) -> Iterator[ContextLimit]:
    kinds = Counter(_layer_types(config))
    for kind, setting in LAYERS_WITH_KEYS.items():
        size = getattr(config, setting, None) if setting is not None else None
        if kinds[kind] and size:
            yield ContextLimit(
                int(size) - 1, f"{kinds[kind]} of {config.num_hidden_layers} layers see {size} tokens ({setting})"
            )
    for setting in SPARSE_BEYOND:
        size = getattr(config, setting, None)
        if isinstance(size, int) and size > 0:
            yield ContextLimit(size, f"layers choose what they see beyond {size} tokens ({setting})")


def _kv_heads(config: Any) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _open_attention(config: Any) -> bool:
    """Whether the model's code asks transformers' attention interface for its attention; True where the code is not known."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return hasattr(sys.modules[made.__module__], "ALL_ATTENTION_FUNCTIONS")


def unsupported_reason(capabilities: Capabilities, kv_source: str, positioning: str) -> str | None:
    """Why K/V of this source cannot be placed like this; None where they can, as far as the configuration says.

    ``prefill`` runs tokens at the positions they get, and ``gather`` at ``absolute`` leaves keys where they are: both need
    positions that can be given. ``gather`` at ``compact`` moves keys, which only a rotation does. ``layer_scope.injection``
    hides slots from layers, which attention computed here can always do.
    """
    if kv_source == "gather" and positioning == "compact" and capabilities.positions != "rotary":
        return f"it moves keys to other positions, and {capabilities.positions} positions cannot be moved"
    return None


def check_supported(capabilities: Capabilities, config: Phase2Config) -> None:
    """Refuse a configuration that this model cannot carry out.

    Raises:
        ModelError: source and positioning do not go together on this model; says which do.
        ConfigError: a layer that does not exist.
    """
    scope_layers(config.layer_scope.selection, capabilities.n_layers, "layer_scope.selection")
    scope_layers(config.layer_scope.injection, capabilities.n_layers, "layer_scope.injection")
    kv_source, positioning = config.prefix.kv_source, config.injection.positioning_mode
    reason = unsupported_reason(capabilities, kv_source, positioning)
    if reason is not None:
        raise unsupported_error(capabilities, kv_source, positioning, reason)


def unsupported_error(capabilities: Capabilities, kv_source: str, positioning: str, reason: str) -> ModelError:
    """The refusal of a source and positioning, with those that are possible."""
    rows = "".join(
        f"\n  prefix.kv_source={source:<8} injection.positioning_mode={mode:<9} "
        f"{'rejected' if (source, mode) == (kv_source, positioning) else _works(capabilities, source, mode)}"
        for source in ("prefill", "gather")
        for mode in ("compact", "absolute")
    )
    return ModelError(
        f"prefix.kv_source={kv_source} with injection.positioning_mode={positioning} is refused for model type "
        f"{capabilities.model_type!r}: {reason}{rows}"
    )


def _works(capabilities: Capabilities, kv_source: str, positioning: str) -> str:
    return unsupported_reason(capabilities, kv_source, positioning) or "works"


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
