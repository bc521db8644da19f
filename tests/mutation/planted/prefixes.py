"""Faults in how a prefix is made and seen: positions, rotation, masks, layers, stale caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from cedkv.checks import consistency
from cedkv.inference import forward, student, teacher
from cedkv.inference import prefix as prefix_module
from cedkv.kv import cache, positioning
from cedkv.kv.attention import HiddenPrefix
from cedkv.kv.cache import KVPrefix
from tests.mutation.planted import Patch, wrap

# positions and rotation


def position_off_by_one(patch: Patch) -> None:
    wrap(patch, prefix_module, "prefill",
         lambda real, lm, rows, at, names: real(lm, rows, [[p + 1 for p in row] for row in at], names))  # fmt: skip


def query_not_behind_the_prefix(patch: Patch) -> None:
    wrap(patch, forward, "_forward_with_prefix", lambda real, model, device, rows, prefix, *rest, **more: real(
        model, device, rows, replace(prefix, query_start=prefix.query_start * 0), *rest, **more))  # fmt: skip


def query_on_the_last_kept_token(patch: Patch) -> None:
    patch.setitem(positioning.POSITIONING, "compact", lambda kept, length: (tuple(range(len(kept))), len(kept) - 1))


def compact_where_absolute_is_asked(patch: Patch) -> None:
    patch.setitem(positioning.POSITIONING, "absolute", positioning.compact)


def keys_not_rotated(patch: Patch) -> None:
    patch.setattr(cache, "rerotate_keys", lambda keys, shift, rotation: keys)


def rotated_the_wrong_way(patch: Patch) -> None:
    wrap(patch, cache, "rerotate_keys", lambda real, keys, shift, rotation: real(keys, -shift, rotation))


def moved_by_row_0_s_shift(patch: Patch) -> None:
    wrap(patch, cache, "rerotate_keys", lambda real, keys, shift, rotation: real(keys, shift[:1].expand_as(shift), rotation))


def rotation_unlike_the_model_s(patch: Patch) -> None:
    for module in (cache, consistency):
        wrap(patch, module, "rerotate_keys", lambda real, keys, shift, rotation: real(
            keys, shift, replace(rotation, inv_freq=rotation.inv_freq.flip(0))))  # fmt: skip


def gathered_off_by_one(patch: Patch) -> None:
    def shifted(real: Any, source: Any, rows: Any, placements: Any, rope_layouts: Any) -> Any:
        before = [replace(p, kept_tokens=tuple(max(0, token - 1) for token in p.kept_tokens)) for p in placements]
        return real(source, rows, before, rope_layouts)

    wrap(patch, prefix_module, "gather", shifted)


def gathered_of_another_sample(patch: Patch) -> None:
    wrap(patch, prefix_module, "gather", lambda real, source, rows, *rest: real(source, [*rows[1:], rows[0]], *rest))


# masks, layers, keys and values


def nulls_not_masked(patch: Patch) -> None:
    def unmasked(real: Any, *given: Any) -> KVPrefix:
        made = real(*given)
        return replace(made, visible=torch.ones_like(made.visible))

    for module in (student, prefix_module, consistency):
        wrap(patch, module, "assemble", unmasked)


def mask_one_short(patch: Patch) -> None:
    """The last kept token is masked out."""

    def short(real: Any, lm: Any, rows: Any, prefix: KVPrefix | None, layers: Any) -> Any:
        if prefix is not None:
            last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
            prefix = replace(prefix, visible=prefix.visible & ~last)
        return real(lm, rows, prefix, layers)

    for module in (forward, teacher):
        wrap(patch, module, "last_logits", short)


def padding_visible(patch: Patch) -> None:
    def seen(real: Any, rows: Any, device: Any) -> Any:
        ids, mask, positions = real(rows, device)
        return ids, torch.ones_like(mask), positions

    wrap(patch, forward, "left_padded", seen)


def teacher_read_at_a_padded_slot(patch: Patch) -> None:
    """Short rows are aligned at their start, and read at the batch's last slot all the same."""

    def right(real: Any, rows: Any, device: Any) -> Any:
        return tuple(
            torch.stack(
                [torch.roll(row, int(mask.sum()) - len(row)) for row, mask in zip(part, real(rows, device)[1], strict=True)]
            )
            for part in real(rows, device)
        )

    wrap(patch, teacher, "left_padded", right)


def keys_and_values_swapped(patch: Patch) -> None:
    for module in (student, prefix_module):
        wrap(patch, module, "assemble", lambda real, keys, values, placements: real(values, keys, placements))


def prefix_in_the_wrong_layers(patch: Patch) -> None:
    def reversed_(real: Any, self: KVPrefix) -> DynamicCache:
        return real(replace(self, keys=self.keys[::-1], values=self.values[::-1]))

    real = KVPrefix.fresh_cache
    patch.setattr(KVPrefix, "fresh_cache", lambda self: reversed_(real, self))


def hidden_from_the_wrong_layers(patch: Patch) -> None:
    wrap(patch, forward, "HiddenPrefix",
         lambda real, slots, layers: HiddenPrefix(slots, frozenset(range(4)) - layers))  # fmt: skip


# caches that are not fresh


def use_changes_the_prefix(patch: Patch) -> None:
    real = KVPrefix.fresh_cache

    def stale(self: KVPrefix) -> DynamicCache:
        made = real(self)
        self.keys[0][:, :, 0] += 1e-3
        return made

    patch.setattr(KVPrefix, "fresh_cache", stale)


def one_cache_for_all_passes(patch: Patch) -> None:
    """The object of the pass before, which has grown."""
    real, kept = KVPrefix.fresh_cache, {}
    patch.setattr(KVPrefix, "fresh_cache", lambda self: kept.setdefault(self.keys[0].shape, real(self)))


def cache_of_an_earlier_prefix(patch: Patch) -> None:
    """The K/V of the first prefix of the same shape."""
    real, kept = KVPrefix.fresh_cache, {}
    patch.setattr(KVPrefix, "fresh_cache", lambda self: real(kept.setdefault(self.keys[0].shape, self)))


def prefix_without_effect(patch: Patch) -> None:
    wrap(patch, forward, "last_logits", lambda real, lm, rows, prefix, layers: real(lm, rows, None, None))
