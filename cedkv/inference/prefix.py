"""From a placement to an injected prefix: the sources of the kept tokens' K/V, chosen by ``prefix.kv_source``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from cedkv.config.extensions import KV_SOURCES
from cedkv.core.values import OnSample, Placement
from cedkv.inference.boundary_replay import replay_boundaries
from cedkv.inference.distributions import require_finite
from cedkv.inference.forward import prefill
from cedkv.kv.cache import KVPrefix, Layers, assemble, gather
from cedkv.models.loading import LanguageModel


class KVSource(ABC):
    """Where the keys and values of kept tokens come from.

    Attributes:
        reads_demo_cache: K/V are taken out of the demo's own cache, which is kept for that; keys that get other positions
            are rotated.
        isolated: kept tokens see each other and nothing else, so that prefix and query are one uncached pass of them.
    """

    reads_demo_cache: ClassVar[bool] = False
    isolated: ClassVar[bool] = False

    @abstractmethod
    def encode(
        self,
        lm: LanguageModel,
        samples: Sequence[OnSample],
        placements: Sequence[Placement],
        demo: KVPrefix | None,
        rows: Sequence[int],
    ) -> tuple[Layers, Layers]:
        """Return the K/V of B samples' kept tokens, before padding.

        They depend on the sample, its kept tokens and their positions alone: conditions that agree in these share them.

        Args:
            demo: demos' caches; given to sources that read them.
            rows: the row of each sample in them.

        Returns:
            Keys and values, one (B, H_kv, max K, D_h) tensor per layer, keys rotated to ``key_positions``; what is beyond
            a row's kept tokens means nothing.

        Raises:
            NumericsError: a key or value is not finite.
        """


class Prefill(KVSource):
    """Runs the kept tokens through the model at their positions: they see each other and no other token."""

    isolated = True

    def encode(
        self,
        lm: LanguageModel,
        samples: Sequence[OnSample],
        placements: Sequence[Placement],
        demo: KVPrefix | None,
        rows: Sequence[int],
    ) -> tuple[Layers, Layers]:
        tokens = [[s.demo_token_ids[t] for t in p.kept_tokens] for s, p in zip(samples, placements, strict=True)]
        return prefill(lm, tokens, [p.key_positions for p in placements], [s.sample_id for s in samples])


class Gather(KVSource):
    """Takes K/V out of the demo's own cache, where kept tokens have seen the whole demo before them."""

    reads_demo_cache = True

    def encode(
        self,
        lm: LanguageModel,
        samples: Sequence[OnSample],
        placements: Sequence[Placement],
        demo: KVPrefix | None,
        rows: Sequence[int],
    ) -> tuple[Layers, Layers]:
        if demo is None:
            raise ValueError("gather needs the teacher's cache")
        keys, values = gather(demo, rows, placements, lm.rope_layouts)
        names = [sample.sample_id for sample in samples]
        for key, value in zip(keys, values, strict=True):
            require_finite(key, "keys of kept tokens", names)
            require_finite(value, "values of kept tokens", names)
        return keys, values


def kv_source(name: str) -> KVSource:
    """Return the K/V source registered under a name. Raises ConfigError as ``Registry.get``."""
    source: KVSource = KV_SOURCES.get(name)()
    return source


def encode(
    lm: LanguageModel,
    source: str,
    samples: Sequence[OnSample],
    placements: Sequence[Placement],
    demo: KVPrefix | None,
    rows: Sequence[int],
    boundary_replay: int = 0,
) -> KVPrefix:
    """Return the prefixes of B samples; arguments as in ``encode_kept``."""
    return assemble(*encode_kept(lm, source, samples, placements, demo, rows, boundary_replay), placements)


def encode_kept(
    lm: LanguageModel,
    source: str,
    samples: Sequence[OnSample],
    placements: Sequence[Placement],
    demo: KVPrefix | None,
    rows: Sequence[int],
    boundary_replay: int = 0,
) -> tuple[Layers, Layers]:
    """Return the K/V of B samples' kept tokens, of the named source; arguments and result as in ``KVSource.encode``.

    Args:
        boundary_replay: first tokens of each run of kept tokens that are run again, see ``inference.boundary_replay``.
    """
    with KV_SOURCES.errors_named(source):
        layers = kv_source(source).encode(lm, samples, placements, demo, rows)
    return replay_boundaries(lm, samples, placements, layers, boundary_replay) if boundary_replay else layers
