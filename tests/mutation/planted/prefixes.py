"""Faults in how a prefix is made and seen: positions, rotation, masks, layers, stale caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from cedkv.kv.attention import HiddenPrefix
from cedkv.kv.cache import KVPrefix
from tests.mutation.planted import Patch
from tests.support import patch_points as points

# positions and rotation


def position_off_by_one(patch: Patch) -> None:
    points.PREFILL.wrap(
        patch, lambda real, lm, rows, positions, names: real(lm, rows, [[p + 1 for p in row] for row in positions], names)
    )


def query_not_behind_the_prefix(patch: Patch) -> None:
    points.FORWARD_WITH_PREFIX.wrap(patch, lambda real, model, device, rows, prefix, *rest, **more: real(
        model, device, rows, replace(prefix, query_start=prefix.query_start * 0), *rest, **more))  # fmt: skip


def query_on_the_last_kept_token(patch: Patch) -> None:
    patch.setitem(points.POSITIONING, "compact", lambda kept, length: (tuple(range(len(kept))), len(kept) - 1))


def compact_where_absolute_is_asked(patch: Patch) -> None:
    patch.setitem(points.POSITIONING, "absolute", points.POSITIONING["compact"])


def keys_not_rotated(patch: Patch) -> None:
    points.ROTATE_KEYS.replace(lambda keys, shift, rotation: keys, patch)


def rotated_the_wrong_way(patch: Patch) -> None:
    points.ROTATE_KEYS.wrap(patch, lambda real, keys, shift, rotation: real(keys, -shift, rotation))


def moved_by_row_0_s_shift(patch: Patch) -> None:
    points.ROTATE_KEYS.wrap(patch, lambda real, keys, shift, rotation: real(keys, shift[:1].expand_as(shift), rotation))


def rotation_unlike_the_model_s(patch: Patch) -> None:
    points.ROTATE_KEYS_EVERYWHERE.wrap(patch, lambda real, keys, shift, rotation: real(
        keys, shift, replace(rotation, inv_freq=rotation.inv_freq.flip(0))))  # fmt: skip


def gathered_off_by_one(patch: Patch) -> None:
    def shifted(real: Any, source: Any, rows: Any, placements: Any, rope_layouts: Any) -> Any:
        before = [replace(p, kept_tokens=tuple(max(0, token - 1) for token in p.kept_tokens)) for p in placements]
        return real(source, rows, before, rope_layouts)

    points.GATHER.wrap(patch, shifted)


def gathered_of_another_sample(patch: Patch) -> None:
    points.GATHER.wrap(patch, lambda real, source, rows, *rest: real(source, [*rows[1:], rows[0]], *rest))


# masks, layers, keys and values


def nulls_not_masked(patch: Patch) -> None:
    def unmasked(real: Any, *given: Any) -> KVPrefix:
        made = real(*given)
        return replace(made, visible=torch.ones_like(made.visible))

    points.ASSEMBLE_EVERYWHERE.wrap(patch, unmasked)


def mask_one_short(patch: Patch) -> None:
    """The last kept token is masked out."""

    def short(real: Any, lm: Any, rows: Any, prefix: KVPrefix | None, layers: Any) -> Any:
        if prefix is not None:
            last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
            prefix = replace(prefix, visible=prefix.visible & ~last)
        return real(lm, rows, prefix, layers)

    points.LAST_LOGITS_WITH_TEACHER.wrap(patch, short)


def padding_visible(patch: Patch) -> None:
    def seen(real: Any, rows: Any, device: Any) -> Any:
        ids, mask, positions = real(rows, device)
        return ids, torch.ones_like(mask), positions

    points.LEFT_PADDED.wrap(patch, seen)


def teacher_read_at_a_padded_slot(patch: Patch) -> None:
    """Short rows are aligned at their start, and read at the batch's last slot all the same."""

    def right(real: Any, rows: Any, device: Any) -> Any:
        return tuple(
            torch.stack(
                [torch.roll(row, int(mask.sum()) - len(row)) for row, mask in zip(part, real(rows, device)[1], strict=True)]
            )
            for part in real(rows, device)
        )

    points.LEFT_PADDED_TEACHER.wrap(patch, right)


def keys_and_values_swapped(patch: Patch) -> None:
    points.ASSEMBLE.wrap(patch, lambda real, keys, values, placements: real(values, keys, placements))


def prefix_in_the_wrong_layers(patch: Patch) -> None:
    def reversed_(real: Any, self: KVPrefix) -> DynamicCache:
        return real(replace(self, keys=self.keys[::-1], values=self.values[::-1]))

    points.FRESH_CACHE.wrap(patch, reversed_)


def hidden_from_the_wrong_layers(patch: Patch) -> None:
    points.HIDDEN_PREFIX.wrap(patch, lambda real, slots, layers: HiddenPrefix(slots, frozenset(range(4)) - layers))  # fmt: skip


# caches that are not fresh


def use_changes_the_prefix(patch: Patch) -> None:
    def stale(real: Any, self: KVPrefix) -> DynamicCache:
        made = real(self)
        self.keys[0][:, :, 0] += 1e-3
        return made

    points.FRESH_CACHE.wrap(patch, stale)


def one_cache_for_all_passes(patch: Patch) -> None:
    """The object of the pass before, which has grown."""
    kept: dict[torch.Size, DynamicCache] = {}
    points.FRESH_CACHE.wrap(patch, lambda real, self: kept.setdefault(self.keys[0].shape, real(self)))


def cache_of_an_earlier_prefix(patch: Patch) -> None:
    """The K/V of the first prefix of the same shape."""
    kept: dict[torch.Size, KVPrefix] = {}
    points.FRESH_CACHE.wrap(patch, lambda real, self: real(kept.setdefault(self.keys[0].shape, self)))


def prefix_without_effect(patch: Patch) -> None:
    points.LAST_LOGITS.wrap(patch, lambda real, lm, rows, prefix, layers: real(lm, rows, None, None))
