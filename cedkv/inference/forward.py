"""Batched forward passes: next-token distributions, and the prefill of a prefix.

Every pass has an explicit attention mask of length past + query (asserted) and explicit positions. Rows of different lengths
are left-padded where the logits of the last token are read, so that ``logits_to_keep=1`` serves all rows:

    prefix (V slots)     query, left-padded                 one row of the mask
    k k k k . . . .      - - - q q q                        1 1 1 1 0 0 0 0  0 0 0 1 1 1 1

Tokens that all rows begin with (the head of a chat template) run through the model once per prefix, not once per row.
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
MIN_SHARED_HEAD = 8
"""First tokens that rows must share before running these separately pays for the extra pass."""


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities over the last dimension (the vocabulary), in float64 (float32 on mps).

    Logits are cast to float32 first, whatever the model's dtype.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits.to(torch.float32).to(dtype).log_softmax(dim=-1)


def kl(student: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(student || reference) = sum_v p_student(v) (log p_student(v) - log p_reference(v)).

    Args:
        student, reference: log-probabilities, (B, vocabulary), or of the same labels, (B, labels).

    Returns:
        (B,) in nats; values that rounding puts below 0 become 0.
    """
    return (student.exp() * (student - reference)).sum(dim=-1).clamp_min(0)


def among_labels(logprobs: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities restricted to some tokens and renormalised: log p(v) - log sum_w p(w), w over the labels.

    Args:
        logprobs: (..., vocabulary).
        labels: token ids.

    Returns:
        (..., labels) in the order of ``labels``.
    """
    return logprobs[..., list(labels)].log_softmax(dim=-1)


@torch.inference_mode()
def next_token_logprobs(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix | None = None,
    injection_layers: frozenset[int] | None = None,
    owners: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the log-probabilities of the token after each row.

    Args:
        rows: B token sequences.
        names: sample ids, for errors.
        prefix: the injected prefixes; None for no prefix.
        injection_layers: layers that see the prefix; None for all.
        owners: for each row, the row of ``prefix`` it runs under; None if row i runs under prefix i.

    Returns:
        (B, vocabulary), in nats.

    Raises:
        NumericsError: a logit is not finite.
    """
    owners = list(range(len(rows)) if owners is None else owners)
    head_length = shared_head(rows, 1 if prefix is None else len(set(owners)))
    if head_length:
        prefix, owners = _append_head(lm, rows[0][:head_length], names, prefix, injection_layers, owners)
        rows = [row[head_length:] for row in rows]

    def compute(indices: list[int]) -> torch.Tensor:
        pass_prefix = None if prefix is None else prefix.rows([owners[i] for i in indices])
        logits = last_logits(lm, [rows[i] for i in indices], pass_prefix, injection_layers)
        require_finite(logits, "logits", [names[i] for i in indices])
        return log_softmax(logits)

    return map_rows(lm, [len(row) for row in rows], compute)


@torch.inference_mode()
def prefill(lm: LanguageModel, rows: Sequence[Ids], positions: Sequence[Ids], names: Sequence[str]) -> tuple[Layers, Layers]:
    """Run tokens through the model at the given positions, without the vocabulary projection.

    Args:
        rows: B token sequences.
        positions: the position of every token.
        names: sample ids, for errors.

    Returns:
        Keys and values, one (B, H_kv, T, D_h) tensor per layer, right-padded; slots beyond a row's length are undefined.

    Raises:
        NumericsError: a key or value of a row is not finite.
    """

    def compute(indices: list[int]) -> tuple[Layers, Layers]:
        width = max(len(rows[i]) for i in indices)
        ids, position_ids, mask = (torch.zeros(len(indices), width, dtype=torch.long) for _ in range(3))
        for row, i in enumerate(indices):
            length = len(rows[i])
            ids[row, :length] = torch.tensor(rows[i])
            position_ids[row, :length] = torch.tensor(positions[i])
            mask[row, :length] = 1
        output = lm.model.base_model(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            position_ids=position_ids.to(lm.device),
            use_cache=True,
        )
        keys, values = read_cache(output.past_key_values)
        for key, value in zip(keys, values, strict=True):
            require_finite(key, "keys", [names[i] for i in indices])
            require_finite(value, "values", [names[i] for i in indices])
        return keys, values

    return map_kv(lm, [len(row) for row in rows], compute)


def full_demo_prefix(keys: Layers, values: Layers, lengths: Sequence[int]) -> KVPrefix:
    """Return the K/V of complete demos as a prefix.

    Args:
        keys, values: (B, H_kv, T, D_h) per layer, right-padded.
        lengths: demo tokens per row. The first ``lengths[b]`` slots of row b are visible, and its query starts right after.
    """
    device = keys[0].device
    length = torch.tensor(lengths, device=device)
    visible = torch.arange(keys[0].shape[2], device=device)[None] < length[:, None]
    return KVPrefix(keys, values, visible, length)


def left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask (1 = token) and 0-based positions, each (B, T) int64, of left-padded rows."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return ids.to(device), mask.to(device), positions.to(device)


def require_finite(values: torch.Tensor, quantity: str, names: Sequence[str]) -> None:
    """Raise if a value is not finite.

    Args:
        values: (B, ...).
        quantity: what the values are, for the error.
        names: B sample ids, for the error.

    Raises:
        NumericsError: some rows are not finite; names the first.
    """
    if values.sum(dtype=torch.float32).isfinite():  # implies that every term is finite; much faster than checking each
        return
    bad = [names[row] for row in (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()]
    if bad:
        raise NumericsError(
            f"{quantity} of {len(bad)} of {len(names)} samples are not finite (first: {bad[0]}); nothing can be decided from "
            "them. Try runtime.torch_dtype=float32; if the error remains, the weights or the sample are damaged"
        )


def last_logits(
    lm: LanguageModel, rows: Sequence[Ids], prefix: KVPrefix | None, injection_layers: frozenset[int] | None
) -> torch.Tensor:
    """Return the logits of each row's last token, (B, vocabulary), from one pass; arguments as ``next_token_logprobs``."""
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
    **model_kwargs: Any,
) -> Any:
    """Run rows after a prefix, with a fresh cache and explicit mask and positions; return the model's output."""
    ids, mask, positions = left_padded(rows, device)
    full_mask = torch.cat([prefix.visible.to(mask.dtype), mask], dim=1)
    if full_mask.shape[1] != prefix.slots + ids.shape[1]:
        raise AssertionError(f"mask covers {full_mask.shape[1]} of {prefix.slots} + {ids.shape[1]} positions")
    hidden = HiddenPrefix(prefix.slots - prefix.head_slots, injection_layers) if injection_layers is not None else None
    with hide_prefix(hidden):
        return model(
            input_ids=ids,
            attention_mask=full_mask,
            position_ids=positions + prefix.query_start[:, None],
            past_key_values=prefix.fresh_cache(),
            use_cache=True,
            **model_kwargs,
        )


def shared_head(rows: Sequence[Ids], prefixes: int) -> int:
    """Return how many first tokens all rows share, or 0 if running these once for each of ``prefixes`` does not pay.

    The last token of a row never counts, because its logits are read.
    """
    if len(rows) <= prefixes:
        return 0
    ordered = [tuple(row) for row in rows]
    first, last = min(ordered), max(ordered)  # tokens that the first and last row in order share, all rows share
    limit = min(map(len, rows)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return length if length >= MIN_SHARED_HEAD else 0


def _append_head(
    lm: LanguageModel,
    head: Ids,
    names: Sequence[str],
    prefix: KVPrefix | None,
    injection_layers: frozenset[int] | None,
    owners: Sequence[int],
) -> tuple[KVPrefix, list[int]]:
    """Run the tokens ``head`` once after each prefix in use; return the extended prefixes and the new owners."""
    if prefix is None:
        keys, values = prefill(lm, [head], [range(len(head))], names)
        return replace(full_demo_prefix(keys, values, [len(head)]), head_slots=len(head)), [0] * len(owners)
    used_rows = sorted(set(owners))
    used = prefix.rows(used_rows)

    def compute(indices: list[int]) -> tuple[Layers, Layers]:
        heads, pass_prefix = [head] * len(indices), used.rows(indices)
        output = _forward_with_prefix(lm.model.base_model, lm.device, heads, pass_prefix, injection_layers)
        return read_cache(output.past_key_values)

    keys, values = map_kv(lm, [len(head)] * len(used_rows), compute)
    head_visible = torch.ones(len(used_rows), len(head), dtype=torch.bool, device=used.visible.device)
    extended = KVPrefix(
        keys=keys,
        values=values,
        visible=torch.cat([used.visible, head_visible], dim=1),
        query_start=used.query_start + len(head),
        head_slots=used.head_slots + len(head),
    )
    return extended, [used_rows.index(owner) for owner in owners]


def map_rows(lm: LanguageModel, lengths: Sequence[int], compute: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """Compute all rows in passes (``Batching.passes``) and return the results, (B, ...), in the original order."""
    results: torch.Tensor | None = None
    for indices, pass_result in lm.batching.passes(lengths, compute):
        if results is None:
            results = pass_result.new_empty(len(lengths), *pass_result.shape[1:])
        results[indices] = pass_result
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
        for layers, layer_buffers in zip(pass_kv, buffers, strict=True):
            for tensor, buffer in zip(layers, layer_buffers, strict=True):
                buffer[indices, :, : tensor.shape[2]] = tensor
    if buffers is None:
        raise ValueError("no rows")
    return tuple(buffers[0]), tuple(buffers[1])


def zeros_like_kv(tensor: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Return zeros of shape (rows, H_kv, length, D_h), with heads, dimension, dtype and device of ``tensor``."""
    return tensor.new_zeros(rows, tensor.shape[1], length, tensor.shape[3])
