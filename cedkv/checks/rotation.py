"""Gate A: what positions do to keys and queries. Keys of a cache can be moved where that is a rotation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cedkv.checks.base import CheckInputs, MeasuredCheck, relative
from cedkv.config.schema import Phase2Config
from cedkv.inference.forward import prefill
from cedkv.kv.attention import AttentionCall, observe_attention, without_sinks
from cedkv.kv.rope import rerotate_keys
from cedkv.kv.transfers import download
from cedkv.models.loading import LanguageModel

ROTATION_SHIFT = 37
"""Positions by which keys are moved in the rotation check: odd, and beyond the shortest rotary wavelengths."""
ROTATION_TOKENS = slice(0, 32, 4)
"""Demo tokens whose keys are moved: every fourth of the first ones. Their keys do not depend on the condition."""
LENGTH_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative change of a query's length that rounding may make, by dtype."""


class _QueryLengths:
    """Keeps the lengths of query vectors, (tokens, H_q) of every layer and pass."""

    def __init__(self) -> None:
        self.passes: list[torch.Tensor] = []

    def observe(self, call: AttentionCall) -> None:
        self.passes.append(call.query.float().norm(dim=-1)[..., -1])


def rotation_moves_queries(lm: LanguageModel, name: str, token: int, positions: Sequence[int], distance: int) -> bool:
    """Return whether positions that are ``distance`` further leave the length of queries as it is, as a rotation does.

    Some models scale queries by their position besides (Ministral 3, Llama 4): keys and query that move together then score
    otherwise. The token, of the sample with this name, runs alone at every position.
    """
    lengths = []
    for shift in (0, distance):
        observer = _QueryLengths()
        with observe_attention(observer), without_sinks():
            prefill(lm, [[token]] * len(positions), [[p + shift] for p in positions], [name] * len(positions))
        lengths.append(torch.cat(download(observer.passes)))
    here, there = lengths
    return torch.allclose(here, there, rtol=LENGTH_TOLERANCE[lm.meta["torch_dtype"]], atol=0.0)


class RotationEquivariance(MeasuredCheck):
    """Keys run at p + d = keys at p, rotated by d, in every layer.

    Largest |K at p+d - R(d) K at p| over the largest |K|, over layers, of every fourth of each demo's first tokens.

    Each token runs alone, and so sees nothing but itself at either position: every layer gets the same input both times,
    and only the rotation differs. (In a batch row, deeper layers also differ by what rounding made of earlier scores,
    which grows with depth.) That is at most 6 roundings: products and sum of a pair are 3 half roundings of the pair's
    length, in each of its two numbers, at p and at p+d, and one more is the moved key's own. (More in float32, where the
    model's angles are rounded as well.) Attention sinks are left out, because their share of a token alone depends on how its
    score was rounded.

    Why: gathered keys are moved by this rotation. Cannot see: positions beyond a demo's first tokens, and other distances
    than the one tried.
    """

    name, unit, threshold = "rotation_equivariance", "relative", "rotation_rel_error_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float] | None:
        return None if lm.rope_layouts is None else inputs.cached(self.name, lambda: self._measure(lm, inputs))

    def expected(self, config: Phase2Config) -> bool:
        return False

    def _measure(self, lm: LanguageModel, inputs: CheckInputs) -> list[float]:
        places = [range(len(sample.demo_token_ids))[ROTATION_TOKENS] for sample in inputs.samples]
        rows = [[sample.demo_token_ids[p]] for sample, of_demo in zip(inputs.samples, places, strict=True) for p in of_demo]
        owners = np.repeat(np.arange(len(places)), list(map(len, places)))
        names = [inputs.names[owner] for owner in owners]
        positions = [p for of_demo in places for p in of_demo]
        distance = min(ROTATION_SHIFT, lm.capabilities.max_positions - 1 - max(positions))
        n, both = len(rows), [[p + shift] for shift in (0, distance) for p in positions]
        with without_sinks():
            everywhere, _ = prefill(lm, rows * 2, both, names * 2)
        keys, moved = ([key[part] for key in everywhere] for part in (slice(n), slice(n, None)))
        shift = torch.full((len(rows), 1), distance, device=lm.device)
        sizes = []
        for key, expected, layout in zip(keys, moved, lm.rope_layouts or (), strict=True):
            difference = rerotate_keys(key, shift, layout) - expected
            sizes += [tensor.float().abs().flatten(1).amax(dim=1) for tensor in (difference, expected)]
        by_layer = torch.stack(download(sizes)).numpy()
        worst = [0.0] * len(places)
        for sample in range(len(places)):
            largest = by_layer[:, owners == sample].max(axis=1).tolist()
            errors = [relative(difference, scale) for difference, scale in zip(largest[::2], largest[1::2], strict=True)]
            worst[sample] = float(np.max(errors))  # NaN stays NaN
        return worst
