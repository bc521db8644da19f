"""Detect by measurement how each layer of a model rotates its keys.

Architectures differ in what they rotate (the whole key or a part, halves or neighbours, forwards or backwards, with other
frequencies in some layers, or not at all), and the configuration does not say. So the same tokens are run at two positions,
and each layer's keys at the second must equal its keys at the first, rotated in one of the known ways. Each token runs alone:
in a sequence with others, deeper layers would also differ by the rounding of attention scores, which has nothing to do with
the rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cedkv.core.errors import ModelError
from cedkv.kv.attention import without_sinks
from cedkv.kv.cache import Layers, read_cache
from cedkv.kv.rope import RopeLayout, rerotate_keys

TOKENS, SHIFT = 8, 37
"""How many tokens are run at two positions, and the distance between these: odd, and beyond the shortest wavelengths."""


@torch.inference_mode()
def detect_rope_layouts(
    model: Any, device: torch.device, max_positions: int, tolerance: float
) -> tuple[RopeLayout, ...] | None:
    """Return each layer's rotation; None if a layer rotates in no way known here, so that its keys cannot be moved.

    Args:
        max_positions: positions that the model has.
        tolerance: the largest relative error of keys (``relative_error``) that rounding may explain.
    """
    shift = min(SHIFT, max_positions - TOKENS)
    if shift < 1:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    ids = (5 + 7 * torch.arange(TOKENS, device=device)[:, None]) % vocabulary
    try:
        keys = _keys(model, ids, shift)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ModelError):
        return None  # a model that cannot run: the certificate reports that, with the reason
    shifts = torch.full((TOKENS, 1), shift, device=device)
    layouts = []
    for key, shifted in (of_layer.chunk(2) for of_layer in keys):
        errors = [
            (relative_error(rerotate_keys(key, shifts, layout), shifted), layout)
            for layout in _candidate_layouts(model, key.shape[-1])
        ]
        error, best = min(errors, key=lambda pair: pair[0])
        if not error <= tolerance:  # a NaN does not fit either
            return None
        layouts.append(best)
    return tuple(layouts)


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest |measured - expected| over the largest |expected|; both tensors have the same shape."""
    return float((measured - expected).float().abs().max() / expected.float().abs().max())


def _keys(model: Any, ids: torch.Tensor, shift: int) -> Layers:
    """Return the keys, (2 T, H_kv, 1, D_h) per layer, of T tokens that each run alone, at positions 0, 1, ..., then ``shift``
    further on.
    """
    positions, twice = torch.arange(len(ids), device=ids.device)[:, None], ids.repeat(2, 1)
    with without_sinks():
        output = model.base_model(
            input_ids=twice,
            attention_mask=torch.ones_like(twice),
            position_ids=torch.cat([positions, positions + shift]),
            use_cache=True,
        )
    return read_cache(output)[0]


def _candidate_layouts(model: Any, dim: int) -> Iterator[RopeLayout]:
    """Yield every way a layer could rotate keys of ``dim`` dimensions with the frequencies that this model holds."""
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
