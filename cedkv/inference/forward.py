"""Batched forward passes: next-token distributions, and the prefill of a prefix.

Every pass has an explicit attention mask of length past + query (asserted) and explicit positions. Rows of different lengths
are left-padded where the logits of the last token are read, so that ``logits_to_keep=1`` serves all rows:

    prefix (V slots)     query, left-padded                 one row of the mask
    k k k k . . . .      - - - q q q                        1 1 1 1 0 0 0 0  0 0 0 1 1 1

Tokens that are given after a row (``Further``: an answer, a continuation) follow in the same pass, right-padded, so that rows
still end in one column: the distribution after j given tokens is in column j after it, and what is read of the row's own
attention is what it would be without them.

Tokens that all rows begin with (the head of a chat template) run through the model once per prefix, not once per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cedkv.inference.batched import map_kv, map_rows
from cedkv.inference.distributions import log_softmax, require_finite
from cedkv.kv.attention import HiddenPrefix, hide_prefix
from cedkv.kv.cache import KVPrefix, Layers, cache_argument, read_cache
from cedkv.kv.transfers import index_on, upload
from cedkv.models.loading import LanguageModel

Ids = Sequence[int]
MIN_SHARED_HEAD = 8
"""First tokens that rows must share before running these separately pays for the extra pass."""


@dataclass(frozen=True)
class Further:
    """Tokens that follow each row in the same pass (teacher forcing), and what takes the distributions after them.

    given: B token sequences, empty ones among them.
    visit: called with j >= 1, the rows with at least j given tokens that are in the pass, and their (rows, vocabulary)
        log-probabilities after the j-th. A pass that ran out of memory is run again, and visited again.
    """

    given: Sequence[Ids]
    visit: Callable[[int, list[int], torch.Tensor], None]


@torch.inference_mode()
def next_token_logprobs(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix | None = None,
    injection_layers: frozenset[int] | None = None,
    owners: Sequence[int] | None = None,
    further: Further | None = None,
) -> torch.Tensor:
    """Return the log-probabilities of the token after each row.

    Args:
        rows: B token sequences.
        names: sample ids, for errors.
        prefix: the injected prefixes; None for no prefix.
        injection_layers: layers that see the prefix; None for all.
        owners: for each row, the row of ``prefix`` it runs under; None if row i runs under prefix i.
        further: tokens that follow the rows, and what takes the distributions after them.

    Returns:
        (B, vocabulary), in nats.

    Raises:
        NumericsError: a logit is not finite.
    """
    rows, prefix, owners = share_head(lm, rows, names, prefix, injection_layers, owners)
    given = given_tokens(further, len(rows))

    def compute(indices: list[int]) -> torch.Tensor:
        pass_prefix = None if prefix is None else prefix.rows([owners[i] for i in indices])
        some = [given[i] for i in indices]
        logits = last_logits(lm, [rows[i] for i in indices], pass_prefix, injection_layers, some)
        return read_logits(logits, "logits", indices, names, further)

    return map_rows(lm, [len(row) + len(tokens) for row, tokens in zip(rows, given, strict=True)], compute)


def given_tokens(further: Further | None, n: int) -> Sequence[Ids]:
    """Return the tokens that follow each of ``n`` rows; none where there is no ``further``."""
    return [()] * n if further is None else further.given


def read_logits(
    logits: torch.Tensor, quantity: str, indices: Sequence[int], names: Sequence[str], further: Further | None
) -> torch.Tensor:
    """Return the log-probabilities after the rows of a pass, and give those after further tokens to ``further.visit``.

    The vocabulary is gone through one position at a time: what is in memory at once does not grow with the tokens given.

    Args:
        logits: (rows, 1 + given tokens, vocabulary), as ``last_logits``.
        quantity: what the logits are, for the error.
        indices: the rows of the pass.
        names: all sample ids, for the error.

    Returns:
        (rows, vocabulary).

    Raises:
        NumericsError: a logit is not finite.
    """
    require_finite(logits[:, 0], quantity, [names[i] for i in indices])
    for position in range(1, logits.shape[1]):
        if further is None:
            raise ValueError("tokens were given, and nothing takes what follows them")
        rows = [row for row, i in enumerate(indices) if len(further.given[i]) >= position]
        after = logits[index_on(rows, logits.device), position]
        require_finite(after, quantity, [names[indices[row]] for row in rows])
        further.visit(position, [indices[row] for row in rows], log_softmax(after))
    return log_softmax(logits[:, 0])


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
            input_ids=upload(ids, lm.device),
            attention_mask=upload(mask, lm.device),
            position_ids=upload(position_ids, lm.device),
            use_cache=True,
        )
        keys, values = read_cache(output)
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
    length = index_on(lengths, device)
    visible = torch.arange(keys[0].shape[2], device=device)[None] < length[:, None]
    return KVPrefix(keys, values, visible, length)


def left_padded(
    rows: Sequence[Ids], device: torch.device, given: Sequence[Ids] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask (1 = token) and 0-based positions, each (B, T) int64, of rows that all end in one column.

    Args:
        rows: B token sequences, left-padded.
        given: tokens that follow each row, right-padded; none by default.
    """
    width = max(map(len, rows))
    total = width + max(map(len, given), default=0)
    ids = torch.zeros(len(rows), total, dtype=torch.long)
    mask = torch.zeros(len(rows), total, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) : width] = torch.tensor(tokens)
        mask[row, width - len(tokens) : width] = 1
    for row, tokens in enumerate(given):
        ids[row, width : width + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, width : width + len(tokens)] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return upload(ids, device), upload(mask, device), upload(positions, device)


def last_logits(
    lm: LanguageModel,
    rows: Sequence[Ids],
    prefix: KVPrefix | None,
    injection_layers: frozenset[int] | None,
    given: Sequence[Ids] = (),
) -> torch.Tensor:
    """Return the logits of each row's last token and of the tokens given after it, from one pass.

    Args:
        rows, prefix, injection_layers: as in ``next_token_logprobs``.
        given: tokens that follow each row.

    Returns:
        (B, 1 + most given tokens, vocabulary); what is beyond a row's given tokens means nothing.
    """
    keep = 1 + max(map(len, given), default=0)
    if prefix is None:
        ids, mask, positions = left_padded(rows, lm.device, given)
        output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep)
    else:
        output = forward_with_prefix(lm.model, lm.device, rows, prefix, injection_layers, given, logits_to_keep=keep)
    logits: torch.Tensor = output.logits[:, -keep:]
    return logits


def forward_with_prefix(
    model: Any,
    device: torch.device,
    rows: Sequence[Ids],
    prefix: KVPrefix,
    injection_layers: frozenset[int] | None,
    given: Sequence[Ids] = (),
    **model_kwargs: Any,
) -> Any:
    """Run rows after a prefix, with a fresh cache and explicit mask and positions; return the model's output."""
    ids, mask, positions = left_padded(rows, device, given)
    full_mask = torch.cat([prefix.visible.to(mask.dtype), mask], dim=1)
    if full_mask.shape[1] != prefix.slots + ids.shape[1]:
        raise AssertionError(f"mask covers {full_mask.shape[1]} of {prefix.slots} + {ids.shape[1]} positions")
    with hide_prefix(hidden_slots(prefix, injection_layers)):
        return model(
            input_ids=ids,
            attention_mask=full_mask,
            position_ids=positions + prefix.query_start[:, None],
            use_cache=True,
            **cache_argument(model, prefix.fresh_cache()),
            **model_kwargs,
        )


def hidden_slots(prefix: KVPrefix, injection_layers: frozenset[int] | None) -> HiddenPrefix | None:
    """Return what layers outside ``injection_layers`` must not see of a prefix; None where every layer sees it."""
    return None if injection_layers is None else HiddenPrefix(prefix.slots - prefix.head_slots, injection_layers)


def share_head(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix | None,
    injection_layers: frozenset[int] | None,
    owners: Sequence[int] | None,
) -> tuple[Sequence[Ids], KVPrefix | None, Sequence[int]]:
    """Run what all rows begin with once per prefix, where that pays; arguments as in ``next_token_logprobs``.

    Returns:
        The rest of each row, the prefixes with the head appended, and the prefix of each row.
    """
    owners = list(range(len(rows)) if owners is None else owners)
    length = shared_head(rows, 1 if prefix is None else len(set(owners)))
    if not length:
        return rows, prefix, owners
    prefix, owners = _append_head(lm, rows[0][:length], names, prefix, injection_layers, owners)
    return [row[length:] for row in rows], prefix, owners


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
        output = forward_with_prefix(lm.model.base_model, lm.device, heads, pass_prefix, injection_layers)
        return read_cache(output)

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
