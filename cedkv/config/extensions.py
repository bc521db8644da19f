"""Registries of everything that a configuration chooses by name, each with the references of its built-in implementations.

Implementations are imported only when a name is looked up. Other packages add names to any registry (docs/extending.md); a new
built-in implementation is a line here and its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cedkv.core.registry import Registry

SELECTORS: Registry[Any] = Registry(
    "selector",
    "cedkv.selectors",
    {
        "attention_diversity_span": "cedkv.selectors.attention_diversity_span:AttentionDiversitySpan",
        "delimiter_span": "cedkv.selectors.delimiter_span:DelimiterSpan",
        "random_span": "cedkv.selectors.random_span:RandomSpan",
        "causal_drop_span": "cedkv.selectors.causal_drop_span:CausalDropSpan",
        "value_weighted_attention": "cedkv.selectors.value_weighted_attention:ValueWeightedAttention",
        "calibrated_attention": "cedkv.selectors.calibrated_attention:CalibratedAttention",
        "snapkv": "cedkv.selectors.snapkv:SnapKV",
        "tova": "cedkv.selectors.tova:Tova",
        "span_drop": "cedkv.selectors.span_drop:ClosedFormDropSpan",
        "fitted_heads": "cedkv.selectors.fitted_heads:FittedHeads",
        "context_cite": "cedkv.selectors.context_cite:ContextCite",
        "whole_shots": "cedkv.selectors.whole_shots:WholeShots",
        "entropy_gated_chunks": "cedkv.selectors.entropy_gated_chunks:EntropyGatedChunks",
        "replay": "cedkv.selectors.replay:Replay",
        "expected_attention": "cedkv.selectors.expected_attention:ExpectedAttentionSpan",
        "key_norm": "cedkv.selectors.key_norm:KeyNormSpan",
        "key_difference": "cedkv.selectors.key_difference:KeyDifferenceSpan",
        "lagkv": "cedkv.selectors.lagkv:LagKV",
        "greedy_teacher": "cedkv.selectors.greedy_teacher:GreedyTeacher",
        "stratified_random_span": "cedkv.selectors.stratified_random_span:StratifiedRandomSpan",
        "accumulated_attention": "cedkv.selectors.accumulated_attention:AccumulatedAttention",
        "sink_recent": "cedkv.selectors.sink_recent:SinkRecent",
        "full_demo": "cedkv.selectors.full_demo:FullDemo",
        "oracle_span": "cedkv.selectors.oracle_span:OracleSpan",
        "transfer_span": "cedkv.selectors.transfer_span:TransferSpan",
        "wrong_demo": "cedkv.selectors.wrong_demo:WrongDemo",
    },
    base="cedkv.selectors.base:Selector",
)
"""``select.mode``: which spans of a demo are kept."""

TASKS: Registry[Any] = Registry(
    "task",
    "cedkv.tasks",
    {
        "symbol_lookup": "cedkv.tasks.symbol_lookup:SymbolLookup",
        "kv_retrieval": "cedkv.tasks.kv_retrieval:KVRetrieval",
        "needle": "cedkv.tasks.needle:Needle",
        "label_mapping": "cedkv.tasks.label_mapping:LabelMapping",
        "word_pairs": "cedkv.tasks.word_pairs:WordPairs",
    },
    base="cedkv.tasks.base:Task",
)
"""``data.task``: where ON episodes come from, without a file."""

POSITIONING: Registry[Any] = Registry(
    "positioning mode",
    "cedkv.positioning",
    {"compact": "cedkv.kv.positioning:compact", "absolute": "cedkv.kv.positioning:absolute"},
)
"""``injection.positioning_mode``: the rotary positions of kept tokens and query."""

PADDING: Registry[Any] = Registry(
    "padding mode",
    "cedkv.padding",
    {"null_pad": "cedkv.kv.positioning:null_pad", "shrink_to_selected": "cedkv.kv.positioning:shrink_to_selected"},
)
"""``prefix.padding_mode``: how many slots a prefix has."""

KV_SOURCES: Registry[Any] = Registry(
    "K/V source",
    "cedkv.kv_sources",
    {"prefill": "cedkv.inference.prefix:Prefill", "gather": "cedkv.inference.prefix:Gather"},
    base="cedkv.inference.prefix:KVSource",
)
"""``prefix.kv_source``: where the keys and values of kept tokens come from."""

REGISTRIES: dict[str, Registry[Any]] = {
    "select.mode": SELECTORS,
    "data.task": TASKS,
    "injection.positioning_mode": POSITIONING,
    "prefix.padding_mode": PADDING,
    "prefix.kv_source": KV_SOURCES,
}
"""Configuration key -> the registry in which its value is a name."""


def providers(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return who provides what is not built in: ``extension.<configuration key>`` -> ``distribution version``.

    Args:
        settings: configuration key -> value, for the keys of ``REGISTRIES`` at least.
    """
    by_key = {key: registry.provider(str(settings[key])) for key, registry in REGISTRIES.items()}
    return {f"extension.{key}": provider for key, provider in by_key.items() if provider is not None}


def sources(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of modules that provide what is not built in: ``code.<configuration key>`` -> sha256.

    Args:
        settings: as for ``providers``.
    """
    by_key = {key: registry.source(str(settings[key])) for key, registry in REGISTRIES.items()}
    return {f"code.{key}": digest for key, digest in by_key.items() if digest is not None}
