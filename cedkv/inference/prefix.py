"""From a placement to an injected prefix: the two sources of K/V, by name."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.core.values import OnSample, Placement
from cedkv.inference.forward import prefill, require_finite
from cedkv.kv.cache import KVPrefix, Layers, assemble, gather
from cedkv.models.loading import LanguageModel


def encode(
    lm: LanguageModel,
    kv_source: str,
    samples: Sequence[OnSample],
    placements: Sequence[Placement],
    demo: KVPrefix | None,
    rows: Sequence[int],
) -> KVPrefix:
    """The prefixes of B samples; arguments as in ``kept_kv``."""
    return assemble(*kept_kv(lm, kv_source, samples, placements, demo, rows), placements)


def kept_kv(
    lm: LanguageModel,
    kv_source: str,
    samples: Sequence[OnSample],
    placements: Sequence[Placement],
    demo: KVPrefix | None,
    rows: Sequence[int],
) -> tuple[Layers, Layers]:
    """K/V of B samples' kept tokens, before padding.

    Args:
        kv_source: ``prefill`` runs the kept tokens alone at their positions, so they see each other and no other token;
            ``gather`` takes their K/V out of the demo's own cache, where they have seen the whole demo before them.
        demo, rows: demos' caches and each sample's row in them; needed by ``gather`` only.

    Returns:
        Keys and values, (B, H_kv, max K, D_h) a layer; what is beyond a row's kept tokens means nothing.
    """
    if kv_source == "gather":
        if demo is None:
            raise ValueError("gather needs the teacher's cache")
        keys, values = gather(demo, rows, placements, lm.rope_layouts)
        names = [sample.sample_id for sample in samples]
        for key, value in zip(keys, values, strict=True):
            require_finite(key, "keys of kept tokens", names)
            require_finite(value, "values of kept tokens", names)
        return keys, values
    tokens = [[s.demo_token_ids[t] for t in p.kept_tokens] for s, p in zip(samples, placements, strict=True)]
    return prefill(lm, tokens, [p.key_positions for p in placements], [s.sample_id for s in samples])
