"""How each layer of a model rotates its keys, found by measuring.

Architectures differ in what they rotate (all of a key or a part, halves or neighbours, forwards or backwards, with other
frequencies in some layers, or not at all), and a configuration does not say. So it is read off the model: the same tokens
are run at two places, and each layer's keys at the one must be its keys at the other, turned in one of the known ways. Each
runs alone: in company, deeper layers would differ by what rounding makes of scores, which is no matter of rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cedkv.core.errors import ModelError
from cedkv.kv.cache import Layers, read_cache
from cedkv.kv.rope import RopeLayout, rerotate_keys

TOKENS, SHIFT = 8, 37
"""Tokens that are run at two places, and how far these are apart: odd, and beyond the shortest wavelengths."""


@torch.inference_mode()
def detect_rope_layouts(model: Any, device: torch.device, reach: int, limit: float) -> tuple[RopeLayout, ...] | None:
    """How each layer rotates its keys; None when a layer does so in no way known here, so that keys cannot be moved.

    Args:
        reach: positions the model has.
        limit: largest |difference| of keys over the largest |key| that rounding may explain.
    """
    shift = min(SHIFT, reach - TOKENS)
    if shift < 1:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    ids = (5 + 7 * torch.arange(TOKENS, device=device)[:, None]) % vocabulary
    try:
        here, there = (_keys(model, ids, start) for start in (0, shift))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ModelError):
        return None  # a model that cannot run: the certificate says so, and why
    turns = torch.full((TOKENS, 1), shift, device=device)
    found = []
    for key, moved in zip(here, there, strict=True):
        tried = [(relative_error(rerotate_keys(key, turns, way), moved), way) for way in _ways(model, key.shape[-1])]
        error, best = min(tried, key=lambda pair: pair[0])
        if not error <= limit:  # NaN is no fit
            return None
        found.append(best)
    return tuple(found)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |difference| over the largest |expected|."""
    return float((found - expected).float().abs().max() / expected.float().abs().max())


def _keys(model: Any, ids: torch.Tensor, start: int) -> Layers:
    """Keys, (T, H_kv, 1, D_h) a layer, of tokens that stand at ``start`` and after it."""
    positions = torch.arange(start, start + len(ids), device=ids.device)[:, None]
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=True)
    return read_cache(output.past_key_values)[0]


def _ways(model: Any, dim: int) -> Iterator[RopeLayout]:
    """Every way a layer could rotate keys of ``dim`` dimensions, with the frequencies this model holds."""
    yield RopeLayout(torch.empty(0))
    frequencies = {
        tuple(buffer.tolist()): buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and 2 * len(buffer) <= dim
    }
    for inv_freq in frequencies.values():
        for start in {0, dim - 2 * len(inv_freq)}:
            for signed in (inv_freq, -inv_freq):
                yield RopeLayout(signed.clone(), "halves", start)
                yield RopeLayout(signed.clone(), "neighbours", start)
