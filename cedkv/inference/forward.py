"""Batched forward passes: next-token distributions, and the prefill of a prefix.

Every pass has an explicit attention mask of length past + query (asserted) and explicit positions. Rows of different
length are padded on the left where the last token's logits are read, so that ``logits_to_keep=1`` serves all of them:

    prefix (V slots)     query, padded on the left          one row of the mask
    k k k k . . . .      - - - q q q q                      1 1 1 1 0 0 0 0  0 0 0 1 1 1 1

A token goes through the model once: what all rows begin with (a chat template's head) is run once for each prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cedkv.core.errors import NumericsError
from cedkv.kv.attention import HiddenPrefix, hide_prefix
from cedkv.kv.cache import KVPrefix, Layers, read_cache
from cedkv.models.loading import LanguageModel

Ids = Sequence[int]
HEAD = 8
"""Tokens that rows must have in common before running them apart pays for the extra pass."""


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of float32-cast logits, in float64 where the device has it."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits.to(torch.float32).to(wide).log_softmax(dim=-1)


def kl(student: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(student || reference) in nats, (B,), from log-probabilities (B, vocabulary); rounding below 0 becomes 0."""
    return (student.exp() * (student - reference)).sum(dim=-1).clamp_min(0)


@torch.inference_mode()
def next_token_logprobs(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix | None = None,
    injection_layers: frozenset[int] | None = None,
    owners: Sequence[int] | None = None,
) -> torch.Tensor:
    """Log-probabilities after each row, (B, vocabulary).

    Args:
        rows: B token sequences.
        names: sample ids, for errors.
        prefix: None for none.
        injection_layers: layers that see the prefix; None for all.
        owners: which prefix each row runs under; None: a prefix for each row, in order.

    Raises:
        NumericsError: a logit is not finite.
    """
    owners = list(range(len(rows)) if owners is None else owners)
    head = shared_head(rows, 1 if prefix is None else len(set(owners)))
    if head:
        prefix, owners = _extended(lm, rows[0][:head], names, prefix, injection_layers, owners)
        rows = [row[head:] for row in rows]

    def compute(part: list[int]) -> torch.Tensor:
        under = None if prefix is None else prefix.rows([owners[i] for i in part])
        logits = last_logits(lm, [rows[i] for i in part], under, injection_layers)
        require_finite(logits, "logits", [names[i] for i in part])
        return log_softmax(logits)

    return map_rows(lm, [len(row) for row in rows], compute)


@torch.inference_mode()
def prefill(lm: LanguageModel, rows: Sequence[Ids], positions: Sequence[Ids], names: Sequence[str]) -> tuple[Layers, Layers]:
    """Run tokens through the model at given positions, without the vocabulary projection.

    Returns:
        Keys and values, one (B, H_kv, T, D_h) tensor a layer, rows aligned at their start; what is beyond a row's
        length is padding and means nothing.

    Raises:
        NumericsError: a key or value of a row is not finite.
    """

    def compute(part: list[int]) -> tuple[Layers, Layers]:
        width = max(len(rows[i]) for i in part)
        ids, at, mask = (torch.zeros(len(part), width, dtype=torch.long) for _ in range(3))
        for row, i in enumerate(part):
            length = len(rows[i])
            ids[row, :length], at[row, :length], mask[row, :length] = torch.tensor(rows[i]), torch.tensor(positions[i]), 1
        output = lm.model.base_model(
            input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), position_ids=at.to(lm.device), use_cache=True
        )
        keys, values = read_cache(output.past_key_values)
        for key, value in zip(keys, values, strict=True):
            require_finite(key, "keys", [names[i] for i in part])
            require_finite(value, "values", [names[i] for i in part])
        return keys, values

    return map_kv(lm, [len(row) for row in rows], compute)


def full_demo_prefix(keys: Layers, values: Layers, lengths: Sequence[int]) -> KVPrefix:
    """K/V of whole demos as a prefix: all ``lengths[b]`` first slots of row b are visible, the query follows at once."""
    device = keys[0].device
    length = torch.tensor(lengths, device=device)
    visible = torch.arange(keys[0].shape[2], device=device)[None] < length[:, None]
    return KVPrefix(keys, values, visible, length)


def left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and 0-based positions, each (B, T), of rows aligned at their end."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return ids.to(device), mask.to(device), positions.to(device)


def require_finite(values: torch.Tensor, what: str, names: Sequence[str]) -> None:
    """Raises NumericsError, with the first one's name, when some of the B rows of ``values``, (B, ...), are not finite."""
    if values.sum(dtype=torch.float32).isfinite():  # only where every term is; much faster than a look at each
        return
    bad = [names[row] for row in (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()]
    if bad:
        raise NumericsError(
            f"{what} of {len(bad)} of {len(names)} samples are not finite (first: {bad[0]}); nothing can be decided from "
            "them. Try runtime.torch_dtype=float32; if it stays, the weights or the sample are damaged"
        )


def last_logits(
    lm: LanguageModel, rows: Sequence[Ids], prefix: KVPrefix | None, injection_layers: frozenset[int] | None
) -> torch.Tensor:
    if prefix is None:
        ids, mask, positions = left_padded(rows, lm.device)
        output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    else:
        output = _forward_with_prefix(lm.model, lm.device, rows, prefix, injection_layers, logits_to_keep=1)
    return output.logits[:, -1]


def _forward_with_prefix(
    model: Any,
    device: torch.device,
    rows: Sequence[Ids],
    prefix: KVPrefix,
    injection_layers: frozenset[int] | None,
    **more: Any,
) -> Any:
    """The output of a forward pass over a prefix: its cache is fresh, its mask and positions are explicit."""
    ids, mask, positions = left_padded(rows, device)
    full = torch.cat([prefix.visible.to(mask.dtype), mask], dim=1)
    if full.shape[1] != prefix.slots + ids.shape[1]:
        raise AssertionError(f"mask covers {full.shape[1]} of {prefix.slots} + {ids.shape[1]} positions")
    hidden = HiddenPrefix(prefix.slots - prefix.head, injection_layers) if injection_layers is not None else None
    with hide_prefix(hidden):
        return model(
            input_ids=ids,
            attention_mask=full,
            position_ids=positions + prefix.query_start[:, None],
            past_key_values=prefix.fresh_cache(),
            use_cache=True,
            **more,
        )


def shared_head(rows: Sequence[Ids], prefixes: int) -> int:
    """How many tokens all rows begin with, if running them once for each of so many prefixes pays; else 0.

    The last token of a row does not count, its logits are read.
    """
    if len(rows) <= prefixes:
        return 0
    ordered = [tuple(row) for row in rows]
    first, last = min(ordered), max(ordered)  # what the first and the last in order share, all between them share
    most = min(map(len, rows)) - 1
    head = next((i for i in range(most) if first[i] != last[i]), most)
    return head if head >= HEAD else 0


def _extended(
    lm: LanguageModel,
    head: Ids,
    names: Sequence[str],
    prefix: KVPrefix | None,
    injection_layers: frozenset[int] | None,
    owners: Sequence[int],
) -> tuple[KVPrefix, list[int]]:
    """The prefixes in use with ``head`` run behind them, once each, and the new owners."""
    if prefix is None:
        keys, values = prefill(lm, [head], [range(len(head))], names)
        return replace(full_demo_prefix(keys, values, [len(head)]), head=len(head)), [0] * len(owners)
    used = sorted(set(owners))
    under = prefix.rows(used)

    def compute(part: list[int]) -> tuple[Layers, Layers]:
        output = _forward_with_prefix(lm.model.base_model, lm.device, [head] * len(part), under.rows(part), injection_layers)
        return read_cache(output.past_key_values)

    keys, values = map_kv(lm, [len(head)] * len(used), compute)
    seen = torch.ones(len(used), len(head), dtype=torch.bool, device=under.visible.device)
    extended = KVPrefix(
        keys, values, torch.cat([under.visible, seen], dim=1), under.query_start + len(head), under.head + len(head)
    )
    return extended, [used.index(owner) for owner in owners]


def map_rows(lm: LanguageModel, lengths: Sequence[int], compute: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """(B, ...) results of all passes, in the rows' own order."""
    out: torch.Tensor | None = None
    for part, found in lm.batching.passes(lengths, compute):
        if out is None:
            out = found.new_empty(len(lengths), *found.shape[1:])
        out[part] = found
    if out is None:
        raise ValueError("no rows")
    return out


def map_kv(
    lm: LanguageModel, lengths: Sequence[int], compute: Callable[[list[int]], tuple[Layers, Layers]]
) -> tuple[Layers, Layers]:
    """K/V of all passes, (B, H_kv, longest, D_h) a layer, in the rows' own order."""
    out: tuple[list[torch.Tensor], ...] | None = None
    for part, found in lm.batching.passes(lengths, compute):
        if part == list(range(len(lengths))):
            return found
        if out is None:
            extra = found[0][0].shape[2] - max(lengths[i] for i in part)  # slots in front of the rows
            out = tuple([room_like(t, len(lengths), max(lengths) + extra) for t in side] for side in found)
        for side, room in zip(found, out, strict=True):
            for tensor, into in zip(side, room, strict=True):
                into[part, :, : tensor.shape[2]] = tensor
    if out is None:
        raise ValueError("no rows")
    return tuple(out[0]), tuple(out[1])


def room_like(like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Zeros for K or V of ``rows`` rows."""
    return like.new_zeros(rows, like.shape[1], length, like.shape[3])
