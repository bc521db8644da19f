"""The KV cache: the only module that touches the internals of a Hugging Face cache.

A prefix is kept as plain tensors, slots in order: kept tokens first, null slots last. Every forward pass gets a fresh cache
object made from these tensors, because caches grow in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cedkv.core.values import Placement
from cedkv.kv.rope import RopeLayout, rerotate_keys
from cedkv.kv.transfers import index_on, upload

Layers = tuple[torch.Tensor, ...]
"""Keys or values, one (B, H_kv, T, D_h) tensor per layer."""


@dataclass(frozen=True)
class KVPrefix:
    """The K/V injected in front of B queries.

    keys, values: one (B, H_kv, V, D_h) tensor per layer; keys are rotated.
    visible: (B, V) bool, False for null slots.
    query_start: (B,) position of each query's first token.
    head_slots: how many of the last slots hold the first tokens that all queries share (``forward.shared_head``) rather than
        prefix; every layer sees these slots.
    """

    keys: Layers
    values: Layers
    visible: torch.Tensor
    query_start: torch.Tensor
    head_slots: int = 0

    @property
    def slots(self) -> int:
        """V, the number of slots, null slots and ``head_slots`` included."""
        return self.visible.shape[1]

    def rows(self, index: Sequence[int]) -> KVPrefix:
        """Return the prefixes of these rows, in this order, repeats allowed; a slice or an expanded row is not copied."""
        index = list(index)
        if index == list(range(len(self.visible))):
            return self
        if index == list(range(index[0], index[0] + len(index))):
            return self._map_tensors(lambda tensor: tensor[index[0] : index[0] + len(index)])
        if index == index[:1] * len(index):
            row = slice(index[0], index[0] + 1)
            return self._map_tensors(lambda tensor: tensor[row].expand(len(index), *tensor.shape[1:]))
        at = index_on(index, self.visible.device)
        return self._map_tensors(lambda tensor: tensor[at.to(tensor.device)])  # layers may be on several devices

    def _map_tensors(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> KVPrefix:
        keys, values = tuple(map(pick, self.keys)), tuple(map(pick, self.values))
        return KVPrefix(keys, values, pick(self.visible), pick(self.query_start), self.head_slots)

    def hide(self, spans: Sequence[Sequence[tuple[int, int]]]) -> KVPrefix:
        """Return this prefix with slots masked out: those of each row's spans ``[start, end)``."""
        visible = self.visible.clone()
        for row, of_row in enumerate(spans):
            for start, end in of_row:
                visible[row, start:end] = False
        return replace(self, visible=visible)

    def to_devices_of(self, other: KVPrefix) -> KVPrefix:
        """Return this prefix with every layer on its device in ``other``: a model may be spread over several devices."""
        keys = tuple(key.to(target.device) for key, target in zip(self.keys, other.keys, strict=True))
        values = tuple(value.to(target.device) for value, target in zip(self.values, other.values, strict=True))
        visible, start = self.visible.to(other.visible.device), self.query_start.to(other.query_start.device)
        return replace(self, keys=keys, values=values, visible=visible, query_start=start)

    def fresh_cache(self) -> DynamicCache:
        """Return a new cache that refers to the tensors of this prefix; growing the cache copies and leaves them unchanged.

        The layers are filled directly: ``update`` would copy the prefix one more time before its first use.
        """
        cache = DynamicCache()
        for key, value in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
            layer.is_initialized = True
            cache.layers.append(layer)
        return cache


def cache_argument(model: Any, cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return a cache as the keyword argument that a model's ``forward`` takes it by.

    transformers 5.24 renamed ``past_key_values`` to ``cache``; earlier versions, and a checkpoint's own code, know only that.
    """
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def output_cache(output: Any) -> DynamicCache:
    """Return the cache in a model's output, by the name that the installed transformers gives it."""
    cache: DynamicCache = output.cache if hasattr(output, "cache") else output.past_key_values
    return cache


def read_cache(output: Any) -> tuple[Layers, Layers]:
    """Return the keys and values of the cache in a model's output, one (B, H_kv, T, D_h) tensor per layer."""
    layers = output_cache(output).layers
    return tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)


def assemble(keys: Layers, values: Layers, placements: Sequence[Placement]) -> KVPrefix:
    """Make a prefix from right-padded K/V: slots beyond a row's kept tokens become null slots, zeroed and hidden.

    Args:
        keys, values: (B, H_kv, max K, D_h) per layer.
        placements: one per row. V is the largest ``slots`` among them.

    Returns:
        A prefix of B rows and V slots.
    """
    slots = max(placement.slots for placement in placements)
    device = keys[0].device
    kept = index_on([len(placement.kept_tokens) for placement in placements], device)
    visible = torch.arange(slots, device=device)[None] < kept[:, None]

    def pad_to_slots(tensor: torch.Tensor) -> torch.Tensor:
        padded = tensor.new_zeros(*tensor.shape[:2], slots, tensor.shape[3])
        length = tensor.shape[2]
        padded[:, :, :length] = tensor.masked_fill(~visible[:, None, :length, None].to(tensor.device), 0)
        return padded

    return KVPrefix(
        tuple(map(pad_to_slots, keys)),
        tuple(map(pad_to_slots, values)),
        visible,
        index_on([placement.query_start for placement in placements], device),
    )


def gather(
    source: KVPrefix, rows: Sequence[int], placements: Sequence[Placement], rope_layouts: Sequence[RopeLayout] | None
) -> tuple[Layers, Layers]:
    """Take the kept tokens' K/V out of the demo's own cache and move the keys to their new positions.

    Args:
        source: the demos' caches; demo token t is in slot t and at position t.
        rows: for each placement, the row of ``source`` that holds its demo.
        placements: B placements.
        rope_layouts: each layer's rotation; None where keys cannot be moved.

    Returns:
        Keys and values, (B, H_kv, max K, D_h) per layer; slots beyond a row's kept tokens are undefined.

    Raises:
        ValueError: keys have to move but cannot; ``capabilities.check_supported`` and ``loading.check_loaded`` reject such a
            configuration earlier.
    """
    device = source.visible.device
    longest = max(len(placement.kept_tokens) for placement in placements)
    tokens = torch.zeros(len(placements), longest, dtype=torch.long)
    shift = torch.zeros_like(tokens)
    for row, placement in enumerate(placements):
        kept = torch.tensor(placement.kept_tokens)
        tokens[row, : len(kept)] = kept
        shift[row, : len(kept)] = torch.tensor(placement.key_positions) - kept
    moves = bool(shift.any())
    demo_rows, tokens, shift = index_on(rows, device)[:, None], upload(tokens, device), upload(shift, device)

    def take_kept(tensor: torch.Tensor) -> torch.Tensor:
        rows_here, tokens_here = demo_rows.to(tensor.device), tokens.to(tensor.device)  # layers may be on several devices
        return tensor[rows_here, :, tokens_here].transpose(1, 2)  # (B, K, H_kv, D_h) -> (B, H_kv, K, D_h)

    keys = tuple(take_kept(key) for key in source.keys)
    if moves:
        if rope_layouts is None:
            raise ValueError("keys that cannot be moved were given new positions")
        keys = tuple(rerotate_keys(key, shift, rope) for key, rope in zip(keys, rope_layouts, strict=True))
    return keys, tuple(take_kept(value) for value in source.values)
