"""Faults in how a prefix is made and seen: positions, rotation, masks, layers, stale caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from cedkv.inference.boundary_replay import replayed_slots
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
    def at_zero(real: Any, model: Any, device: Any, rows: Any, prefix: KVPrefix, *rest: Any, **named: Any) -> Any:
        return real(model, device, rows, replace(prefix, query_start=prefix.query_start * 0), *rest, **named)

    points.FORWARD_WITH_PREFIX.wrap(patch, at_zero)


def query_on_the_last_kept_token(patch: Patch) -> None:
    patch.setitem(points.POSITIONING, "compact", lambda kept, length: (tuple(range(len(kept))), len(kept) - 1))


def prefix_at_wrong_positions(patch: Patch) -> None:
    points.PREFILL.wrap(
        patch, lambda real, lm, rows, positions, names: real(lm, rows, [[2 * p for p in row] for row in positions], names)
    )


def a_place_by_slot(patch: Patch) -> None:
    """Queries are placed by counting slots, as where ``position_ids`` are ignored: gaps close."""

    def closing(real: Any, lm: Any, rows: Any, prefix: KVPrefix | None, *rest: Any) -> Any:
        prefix = None if prefix is None else replace(prefix, query_start=torch.full_like(prefix.query_start, prefix.slots))
        return real(lm, rows, prefix, *rest)

    points.LAST_LOGITS.wrap(patch, closing)


def compact_where_absolute_is_asked(patch: Patch) -> None:
    patch.setitem(points.POSITIONING, "absolute", points.POSITIONING["compact"])


def keys_not_rotated(patch: Patch) -> None:
    points.ROTATE_KEYS.replace(lambda keys, shift, rotation: keys, patch)


def rotated_the_wrong_way(patch: Patch) -> None:
    points.ROTATE_KEYS.wrap(patch, lambda real, keys, shift, rotation: real(keys, -shift, rotation))


def moved_by_row_0_s_shift(patch: Patch) -> None:
    points.ROTATE_KEYS.wrap(patch, lambda real, keys, shift, rotation: real(keys, shift[:1].expand_as(shift), rotation))


def rotation_unlike_the_model_s(patch: Patch) -> None:
    points.ROTATE_KEYS_EVERYWHERE.wrap(
        patch, lambda real, keys, shift, rotation: real(keys, shift, replace(rotation, inv_freq=rotation.inv_freq.flip(0)))
    )


def keys_turned_by_other_angles(patch: Patch) -> None:
    points.ROTATE_KEYS_CHECKED.wrap(
        patch, lambda real, keys, shift, rotation: real(keys, shift, replace(rotation, inv_freq=1.01 * rotation.inv_freq))
    )


def gathered_off_by_one(patch: Patch) -> None:
    def shifted(real: Any, source: Any, rows: Any, placements: Any, rope_layouts: Any) -> Any:
        before = [replace(p, kept_tokens=tuple(max(0, token - 1) for token in p.kept_tokens)) for p in placements]
        return real(source, rows, before, rope_layouts)

    points.GATHER.wrap(patch, shifted)


def gathered_off_by_one_behind_a_gap(patch: Patch) -> None:
    """Where kept tokens leave a gap, the token in front of each of the later ones is taken."""

    def shifted(real: Any, source: Any, rows: Any, placements: Any, rope_layouts: Any) -> Any:
        before = []
        for placement in placements:
            first = placement.kept_tokens[0]
            kept = [token - (token > first + index) for index, token in enumerate(placement.kept_tokens)]
            before.append(replace(placement, kept_tokens=tuple(kept)))
        return real(source, rows, before, rope_layouts)

    points.GATHER.wrap(patch, shifted)


def last_layer_s_keys_of_row_0_for_all(patch: Patch) -> None:
    """What row 0 itself gets is right, and so is every other layer."""

    def first_row(real: Any, *arguments: Any) -> Any:
        keys, values = real(*arguments)
        return (*keys[:-1], keys[-1][:1].expand_as(keys[-1])), values

    points.ENCODE.wrap(patch, first_row)


def gathered_of_another_sample(patch: Patch) -> None:
    points.GATHER.wrap(patch, lambda real, source, rows, *rest: real(source, [*rows[1:], rows[0]], *rest))


# tokens run again behind the kept tokens before them


def replayed_one_position_late(patch: Patch) -> None:
    def late(real: Any, lm: Any, samples: Any, placements: Any, *rest: Any) -> Any:
        return real(lm, samples, [replace(p, key_positions=tuple(n + 1 for n in p.key_positions)) for p in placements], *rest)

    points.REPLAY_BOUNDARIES.wrap(patch, late)


def replayed_tokens_see_later_ones(patch: Patch) -> None:
    """Every token that is run again sees what the last one sees."""

    def all_see(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        mask = named["attention_mask"]
        return arguments, {**named, "attention_mask": mask | mask.any(dim=2, keepdim=True)}

    def uncausal(real: Any, lm: Any, *rest: Any) -> Any:
        hook = lm.model.base_model.register_forward_pre_hook(all_see, with_kwargs=True)
        try:
            return real(lm, *rest)
        finally:
            hook.remove()

    points.REPLAY_BOUNDARIES.wrap(patch, uncausal)


def replayed_tokens_one_slot_late(patch: Patch) -> None:
    """K/V of each token that is run again are written where the next one's belong; those of the first one stay."""

    def shifted(real: Any, lm: Any, samples: Any, placements: Any, kept: Any, k: int) -> Any:
        new = real(lm, samples, placements, kept, k)
        layers = tuple(tuple(tensor.clone() for tensor in tensors) for tensors in kept)
        for row, placement in enumerate(placements):
            slots = replayed_slots(placement.kept_tokens, k)
            for tensor, replayed in zip((*layers[0], *layers[1]), (*new[0], *new[1]), strict=True):
                tensor[row, :, slots[1:]] = replayed[row, :, slots[:-1]]
        return layers

    points.REPLAY_BOUNDARIES.wrap(patch, shifted)


# masks, layers, keys and values


def nulls_not_masked(patch: Patch) -> None:
    def unmasked(real: Any, *arguments: Any) -> KVPrefix:
        made = real(*arguments)
        return replace(made, visible=torch.ones_like(made.visible))

    points.ASSEMBLE_EVERYWHERE.wrap(patch, unmasked)


def nulls_of_an_empty_row_not_masked(patch: Patch) -> None:
    def unmasked(real: Any, *arguments: Any) -> KVPrefix:
        made = real(*arguments)
        return replace(made, visible=made.visible | ~made.visible.any(dim=1, keepdim=True))

    points.ASSEMBLE_EVERYWHERE.wrap(patch, unmasked)


def null_pad_visible_in_the_arms(patch: Patch) -> None:
    """All slots that a placement asks for are visible, so that with ``null_pad`` queries attend to keys of zeros."""

    def unmasked(real: Any, keys: Any, values: Any, placements: Any) -> KVPrefix:
        made = real(keys, values, placements)
        slots = torch.tensor([placement.slots for placement in placements], device=made.visible.device)
        return replace(made, visible=torch.arange(made.slots, device=slots.device) < slots[:, None])

    points.ASSEMBLE.wrap(patch, unmasked)


def mask_one_short(patch: Patch) -> None:
    """The last kept token is masked out."""

    def short(real: Any, lm: Any, rows: Any, prefix: KVPrefix | None, *rest: Any) -> Any:
        if prefix is not None:
            last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
            prefix = replace(prefix, visible=prefix.visible & ~last)
        return real(lm, rows, prefix, *rest)

    points.LAST_LOGITS_WITH_TEACHER.wrap(patch, short)


def padding_visible(patch: Patch) -> None:
    def seen(real: Any, *arguments: Any) -> Any:
        ids, mask, positions = real(*arguments)
        return ids, torch.ones_like(mask), positions

    points.LEFT_PADDED.wrap(patch, seen)


def keys_and_values_swapped(patch: Patch) -> None:
    points.ASSEMBLE.wrap(patch, lambda real, keys, values, placements: real(values, keys, placements))


def prefix_in_the_wrong_layers(patch: Patch) -> None:
    def reversed_(real: Any, self: KVPrefix) -> DynamicCache:
        return real(replace(self, keys=self.keys[::-1], values=self.values[::-1]))

    points.FRESH_CACHE.wrap(patch, reversed_)


def hidden_from_the_wrong_layers(patch: Patch) -> None:
    points.HIDDEN_PREFIX.wrap(patch, lambda real, slots, layers: HiddenPrefix(slots, frozenset(range(4)) - layers))


# caches that are not fresh


def use_changes_the_prefix(patch: Patch) -> None:
    def stale(real: Any, self: KVPrefix) -> DynamicCache:
        made = real(self)
        self.keys[0][:, :, 0] += 1e-3
        return made

    points.FRESH_CACHE.wrap(patch, stale)


def use_rounds_the_prefix(patch: Patch) -> None:
    """The first key is rounded in place: too little to show in an answer, and the same each time."""

    def rounded(real: Any, self: KVPrefix) -> DynamicCache:
        self.keys[0][:, :, 0] = self.keys[0][:, :, 0].to(torch.float16).to(self.keys[0].dtype)
        return real(self)

    points.FRESH_CACHE.wrap(patch, rounded)


def one_cache_for_all_passes(patch: Patch) -> None:
    """The object of the pass before, which has grown."""
    kept: dict[torch.Size, DynamicCache] = {}
    points.FRESH_CACHE.wrap(patch, lambda real, self: kept.setdefault(self.keys[0].shape, real(self)))


def cache_of_an_earlier_prefix(patch: Patch) -> None:
    """The K/V of the first prefix of the same shape."""
    kept: dict[torch.Size, KVPrefix] = {}
    points.FRESH_CACHE.wrap(patch, lambda real, self: real(kept.setdefault(self.keys[0].shape, self)))


def prefix_without_effect(patch: Patch) -> None:
    points.LAST_LOGITS.wrap(patch, lambda real, lm, rows, prefix, layers, *rest: real(lm, rows, None, None, *rest))
