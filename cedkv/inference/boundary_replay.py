"""Boundary replay: the first tokens of each kept span run again behind the kept tokens before them (EPIC, 2410.15332).

K/V gathered from a demo's cache hold what the whole demo before a token said. Where a run of kept tokens begins, its left
context is another one in the prefix; the first k tokens of the run are run again there, between gather and query, and their
K/V replaced. A run that begins with the demo has lost nothing and is left alone. With k as long as the runs, the prefix is
that of ``prefill``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cedkv.core.values import OnSample, Placement
from cedkv.inference.batched import map_kv
from cedkv.inference.distributions import require_finite
from cedkv.kv.cache import KVPrefix, Layers, cache_argument, read_cache
from cedkv.kv.transfers import index_on, upload
from cedkv.models.loading import LanguageModel


def replayed_slots(kept: Sequence[int], k: int) -> list[int]:
    """Return the slots of a prefix whose tokens are run again: the first k of each run that does not begin with the demo."""
    slots, run = [], 0
    for slot, token in enumerate(kept):
        run = run + 1 if slot and token == kept[slot - 1] + 1 else 1
        if run <= k and token - run + 1 > 0:
            slots.append(slot)
    return slots


@torch.inference_mode()
def replay_boundaries(
    lm: LanguageModel, samples: Sequence[OnSample], placements: Sequence[Placement], kept: tuple[Layers, Layers], k: int
) -> tuple[Layers, Layers]:
    """Return the K/V of B samples' kept tokens with those of the replayed tokens computed again.

    Args:
        kept: keys and values, (B, H_kv, max K, D_h) per layer, at the placements' positions.
        k: tokens of each run.

    Raises:
        NumericsError: a key or value is not finite.
    """
    slots = [replayed_slots(placement.kept_tokens, k) for placement in placements]
    rows = [row for row, replayed in enumerate(slots) if replayed]
    if not rows:
        return kept
    device = kept[0][0].device

    def compute(indices: list[int]) -> tuple[Layers, Layers]:
        some = [rows[i] for i in indices]
        width = max(len(slots[row]) for row in some)
        ids, positions = (torch.zeros(len(some), width, dtype=torch.long) for _ in range(2))
        mask = torch.zeros(len(some), 1, width, kept[0][0].shape[2] + width, dtype=torch.bool)
        for at, row in enumerate(some):
            placement, replayed = placements[row], slots[row]
            n, old = len(replayed), torch.tensor(placement.key_positions)
            ids[at, :n] = torch.tensor([samples[row].demo_token_ids[placement.kept_tokens[slot]] for slot in replayed])
            positions[at, :n] = old[replayed]
            stays = torch.ones(len(old), dtype=torch.bool)
            stays[replayed] = False
            mask[at, 0, :n, : len(old)] = stays & (old[None] < positions[at, :n, None])
            mask[at, 0, :n, -width:][:, :n] = torch.ones(n, n, dtype=torch.bool).tril()
            mask[at, 0, n:, -width] = True  # a row that sees nothing would give NaN
        picked = index_on(some, device)
        pass_keys, pass_values = (tuple(tensor[picked.to(tensor.device)] for tensor in tensors) for tensors in kept)
        visible = torch.ones(len(some), kept[0][0].shape[2], dtype=torch.bool, device=device)
        prefix = KVPrefix(pass_keys, pass_values, visible, torch.zeros(len(some), dtype=torch.long, device=device))
        output = lm.model.base_model(
            input_ids=upload(ids, lm.device),
            attention_mask=upload(mask, lm.device),
            position_ids=upload(positions, lm.device),
            use_cache=True,
            **cache_argument(lm.model.base_model, prefix.fresh_cache()),
        )
        keys, values = read_cache(output)
        return tuple(key[:, :, -width:] for key in keys), tuple(value[:, :, -width:] for value in values)

    new = map_kv(lm, [len(slots[row]) for row in rows], compute)
    names = [samples[row].sample_id for row in rows]
    replayed_of = [index_on(slots[row], device) for row in rows]
    replaced: list[tuple[torch.Tensor, ...]] = []
    for old_layers, new_layers in zip(kept, new, strict=True):
        layers = []
        for old_tensor, new_tensor in zip(old_layers, new_layers, strict=True):
            require_finite(new_tensor, "K/V of replayed tokens", names)
            tensor = old_tensor.clone()
            for at, (row, replayed) in enumerate(zip(rows, replayed_of, strict=True)):
                tensor[row, :, replayed.to(tensor.device)] = new_tensor[at, :, : len(replayed)]
            layers.append(tensor)
        replaced.append(tuple(layers))
    return replaced[0], replaced[1]
