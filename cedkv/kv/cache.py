"""The key/value cache: the only file that touches the insides of a Hugging Face cache.

A prefix is kept as plain tensors, slots first to last, kept tokens in front and null slots behind; a fresh cache object
is made from it for every forward pass, because caches grow in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cedkv.core.values import Placement
from cedkv.kv.rope import RopeLayout, rerotate_keys

Layers = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class KVPrefix:
    """The K/V injected in front of B queries.

    keys, values: one (B, H_kv, V, D_h) tensor a layer; keys are rotated.
    visible: (B, V) bool, False for null slots.
    query_start: (B,) position of each query's first token.
    head: how many of the last slots are no prefix but tokens that all queries begin with; every layer sees those.
    """

    keys: Layers
    values: Layers
    visible: torch.Tensor
    query_start: torch.Tensor
    head: int = 0

    @property
    def slots(self) -> int:
        return self.visible.shape[1]

    def rows(self, index: Sequence[int]) -> KVPrefix:
        """The prefixes of these rows, in this order, repeats allowed; copied only where rows are picked out."""
        index = list(index)
        if index == list(range(len(self.visible))):
            return self
        if index == list(range(index[0], index[0] + len(index))):
            return self._each(lambda tensor: tensor[index[0] : index[0] + len(index)])
        if index == index[:1] * len(index):
            return self._each(lambda tensor: tensor[index[:1]].expand(len(index), *tensor.shape[1:]))
        return self._each(lambda tensor: tensor[index])

    def _each(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> KVPrefix:
        keys, values = tuple(map(pick, self.keys)), tuple(map(pick, self.values))
        return KVPrefix(keys, values, pick(self.visible), pick(self.query_start), self.head)

    def hide(self, spans: Sequence[tuple[int, int]]) -> KVPrefix:
        """Slots ``[start, end)`` of each row are masked out, the rest stays."""
        visible = self.visible.clone()
        for row, (start, end) in enumerate(spans):
            visible[row, start:end] = False
        return replace(self, visible=visible)

    def to_devices_of(self, other: KVPrefix) -> KVPrefix:
        """The same, every layer on the device that it has in ``other``: a model may be spread over several."""
        keys = tuple(key.to(there.device) for key, there in zip(self.keys, other.keys, strict=True))
        values = tuple(value.to(there.device) for value, there in zip(self.values, other.values, strict=True))
        visible, start = self.visible.to(other.visible.device), self.query_start.to(other.query_start.device)
        return replace(self, keys=keys, values=values, visible=visible, query_start=start)

    def fresh_cache(self) -> DynamicCache:
        """A new cache holding this prefix. It refers to the tensors; growing it copies and leaves them as they are.

        Layers are filled by hand: ``update`` would copy a prefix once more before its first use.
        """
        cache = DynamicCache()
        for key, value in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
            layer.is_initialized = True
            cache.layers.append(layer)
        return cache


def read_cache(cache: DynamicCache) -> tuple[Layers, Layers]:
    """The keys and values of a cache, one (B, H_kv, T, D_h) tensor a layer."""
    return tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers)


def assemble(keys: Layers, values: Layers, placements: Sequence[Placement]) -> KVPrefix:
    """Make a prefix of right-padded K/V: what is beyond a row's kept tokens becomes null slots, zeroed and hidden.

    Args:
        keys, values: (B, H_kv, max K, D_h) a layer.
        placements: one a row. V is the largest ``slots`` among them.
    """
    slots = max(placement.slots for placement in placements)
    device = keys[0].device
    kept = torch.tensor([len(placement.kept_tokens) for placement in placements], device=device)
    visible = torch.arange(slots, device=device)[None] < kept[:, None]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.new_zeros(*tensor.shape[:2], slots, tensor.shape[3])
        length = tensor.shape[2]
        out[:, :, :length] = tensor.masked_fill(~visible[:, None, :length, None].to(tensor.device), 0)
        return out

    return KVPrefix(
        tuple(map(padded, keys)),
        tuple(map(padded, values)),
        visible,
        torch.tensor([placement.query_start for placement in placements], device=device),
    )


def gather(
    source: KVPrefix, rows: Sequence[int], placements: Sequence[Placement], rope_layouts: Sequence[RopeLayout] | None
) -> tuple[Layers, Layers]:
    """Take the kept tokens' K/V out of the demo's own cache and move the keys to their new positions.

    Args:
        source: demos' caches, demo token t in slot t and at position t.
        rows: for each placement the row of ``source`` its tokens are of.
        rope_layouts: how each layer's keys are moved; None where they cannot be.

    Returns:
        Keys and values, (B, H_kv, max K, D_h) a layer; what is beyond a row's kept tokens means nothing.

    Raises:
        ValueError: keys that cannot be moved have to move; ``capabilities.require`` refuses that before.
    """
    device = source.visible.device
    longest = max(len(placement.kept_tokens) for placement in placements)
    index = torch.zeros(len(placements), longest, dtype=torch.long, device=device)
    shift = torch.zeros_like(index)
    for row, placement in enumerate(placements):
        kept = torch.tensor(placement.kept_tokens, device=device)
        index[row, : len(kept)] = kept
        shift[row, : len(kept)] = torch.tensor(placement.key_positions, device=device) - kept
    of = torch.tensor(list(rows), device=device)[:, None]

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        at = tensor.device  # a model may be spread over several
        return tensor[of.to(at), :, index.to(at)].transpose(1, 2)  # (B, K, H_kv, D_h) -> (B, H_kv, K, D_h)

    keys = tuple(taken(key) for key in source.keys)
    if shift.any():
        if rope_layouts is None:
            raise ValueError("keys that cannot be moved were given new positions")
        keys = tuple(rerotate_keys(key, shift, rotation) for key, rotation in zip(keys, rope_layouts, strict=True))
    return keys, tuple(taken(value) for value in source.values)
