"""Compute rows in passes of as many as fit, and put the results together in the rows' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cedkv.kv.cache import Layers
from cedkv.kv.transfers import index_on
from cedkv.models.loading import LanguageModel


def map_rows(lm: LanguageModel, lengths: Sequence[int], compute: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """Compute all rows in passes (``Batching.passes``) and return the results, (B, ...), in the original order."""
    results: torch.Tensor | None = None
    for indices, pass_result in lm.batching.passes(lengths, compute):
        if results is None:
            results = pass_result.new_empty(len(lengths), *pass_result.shape[1:])
        results[index_on(indices, results.device)] = pass_result
    if results is None:
        raise ValueError("no rows")
    return results


def map_kv(
    lm: LanguageModel, lengths: Sequence[int], compute: Callable[[list[int]], tuple[Layers, Layers]]
) -> tuple[Layers, Layers]:
    """Compute K/V in passes and return keys and values, (B, H_kv, longest, D_h) per layer, in the original order."""
    buffers: tuple[list[torch.Tensor], ...] | None = None
    for indices, pass_kv in lm.batching.passes(lengths, compute):
        if indices == list(range(len(lengths))):
            return pass_kv
        if buffers is None:
            past_slots = pass_kv[0][0].shape[2] - max(lengths[i] for i in indices)  # slots in front of the rows
            longest = max(lengths) + past_slots
            buffers = tuple([zeros_like_kv(tensor, len(lengths), longest) for tensor in layers] for layers in pass_kv)
        at = index_on(indices, buffers[0][0].device)
        for layers, layer_buffers in zip(pass_kv, buffers, strict=True):
            for tensor, buffer in zip(layers, layer_buffers, strict=True):
                buffer[at.to(buffer.device), :, : tensor.shape[2]] = tensor
    if buffers is None:
        raise ValueError("no rows")
    return tuple(buffers[0]), tuple(buffers[1])


def zeros_like_kv(tensor: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Return zeros of shape (rows, H_kv, length, D_h), with heads, dimension, dtype and device of ``tensor``."""
    return tensor.new_zeros(rows, tensor.shape[1], length, tensor.shape[3])
