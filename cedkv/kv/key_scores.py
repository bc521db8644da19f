"""Readings of a demo's cached keys and values: key norm, key difference, LagKV's ranks. None of them sees a query."""

from __future__ import annotations

import torch

from cedkv.kv.readings import KeyDifference, KeyNorm, LagRelative, Reading


def key_scores(reading: Reading, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a reading of one layer of one demo, (H_kv, L) float32.

    Args:
        keys, values: (H_kv, L, D_h), keys rotated to their demo positions.

    Raises:
        TypeError: the reading is not computed from keys and values alone.
    """
    keys, values = keys.float(), values.float()
    if isinstance(reading, KeyNorm):
        return -keys.norm(dim=-1)
    if isinstance(reading, KeyDifference):
        return -torch.cosine_similarity(keys, keys.mean(dim=1, keepdim=True), dim=-1)
    if isinstance(reading, LagRelative):
        return _lag_relative(reading, keys, values)
    raise TypeError(f"{type(reading).__name__} is no reading of keys and values alone")


def _lag_relative(reading: LagRelative, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    heads, length, _ = keys.shape
    partitions = (length - reading.sinks) // reading.lag
    scores = torch.ones(heads, length, device=keys.device)
    if partitions > 1:
        end = reading.sinks + partitions * reading.lag
        spread = [_spread(x[:, reading.sinks : end].reshape(heads, partitions, reading.lag, -1)) for x in (keys, values)]
        ranks = (spread[0] + spread[1]).argsort(dim=-1, stable=True).argsort(dim=-1).float() / reading.lag
        scores[:, reading.sinks : end - reading.lag] = ranks.flatten(1)
    return scores


def _spread(partitions: torch.Tensor) -> torch.Tensor:
    """Return softmax over a partition of the std over channels, on the next one's scale: (H, P, lag, D) -> (H, P - 1, lag)."""
    following, own = partitions[:, 1:], partitions[:, :-1]
    low, high = following.amin(dim=2, keepdim=True), following.amax(dim=2, keepdim=True)
    return ((own - low) / (high - low)).std(dim=-1).softmax(dim=-1)
