"""Batched forward passes: next-token distributions, the teacher's reading of a demo, the prefill of a prefix.

Every pass has an explicit attention mask of length past + query (asserted) and explicit positions. Rows of different
length are padded on the left where the last token's logits are read, so that ``logits_to_keep=1`` serves all of them:

    prefix (V slots)     query, padded on the left          one row of the mask
    k k k k . . . .      - - - q q q q                      1 1 1 1 0 0 0 0  0 0 0 1 1 1 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cedkv.errors import NumericsError
from cedkv.lm.attention import AttentionReader, HiddenPrefix, hiding, reading
from cedkv.lm.cache import Layers, PrefixBatch, read_cache
from cedkv.lm.source import LanguageModel

Ids = Sequence[int]


@dataclass(frozen=True)
class TeacherReading:
    """One pass over demo + query for B samples.

    logprobs: (B, vocabulary) of the token after the query.
    demo: the demos' K/V as a prefix (left-padded: see ``offsets``), or None when not asked for.
    offsets: slot of demo token 0, per row.
    demo_lengths, query_lengths: tokens, per row.
    seen: the attention that was read, (B, window, T) and (B, T) a layer.
    names: sample ids.
    """

    logprobs: torch.Tensor
    demo: PrefixBatch | None
    offsets: list[int]
    demo_lengths: list[int]
    query_lengths: list[int]
    seen: AttentionReader
    names: list[str]

    def attention(self, row: int, layers: frozenset[int], window: int) -> NDArray[np.float64]:
        """(L,) attention of the query's last ``window`` tokens to the demo, mean over those, heads and ``layers``."""
        wanted = min(window, self.query_lengths[row])  # rows before the query's first token belong to the demo
        at = slice(self.offsets[row], self.offsets[row] + self.demo_lengths[row])
        rows = torch.stack([self.seen.rows[layer][row, -wanted:, at] for layer in sorted(layers)])
        return self._finite(rows.mean(dim=(0, 1)), row)

    def accumulated(self, row: int, layers: frozenset[int]) -> NDArray[np.float64]:
        """(L,) attention received from later tokens, over how many those are, mean over heads and ``layers``."""
        length, total = self.demo_lengths[row], self.demo_lengths[row] + self.query_lengths[row]
        at = slice(self.offsets[row], self.offsets[row] + length)
        received = torch.stack([self.seen.received[layer][row, at] for layer in sorted(layers)]).mean(dim=0)
        later = total - 1 - torch.arange(length, device=received.device)
        return self._finite(received / later, row)

    def _finite(self, scores: torch.Tensor, row: int) -> NDArray[np.float64]:
        _require_finite(scores[None], "attention scores", [self.names[row]])
        return scores.double().cpu().numpy()


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of float32-cast logits, in float64 where the device has it."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits.to(torch.float32).to(wide).log_softmax(dim=-1)


def kl(student: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(student || reference) in nats, (B,), from log-probabilities (B, vocabulary); rounding below 0 becomes 0."""
    return (student.exp() * (student - reference)).sum(dim=-1).clamp_min(0)


def _left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and 0-based positions, each (B, T), of rows aligned at their end."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return ids.to(device), mask.to(device), positions.to(device)


def _require_finite(values: torch.Tensor, what: str, names: Sequence[str]) -> None:
    bad = [names[row] for row in (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()]
    if bad:
        raise NumericsError(
            f"{what} of {len(bad)} of {len(names)} samples are not finite (first: {bad[0]}); nothing can be decided from "
            "them. Try runtime.torch_dtype=float32; if it stays, the weights or the sample are damaged"
        )


@torch.inference_mode()
def next_token_logprobs(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: PrefixBatch | None = None,
    injection_layers: frozenset[int] | None = None,
) -> torch.Tensor:
    """Log-probabilities after each row, (B, vocabulary).

    Args:
        rows: B token sequences.
        names: sample ids, for errors.
        prefix: one prefix a row; None for none.
        injection_layers: layers that see the prefix; None for all.

    Raises:
        NumericsError: a logit is not finite.
    """
    out: list[torch.Tensor | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like length share a batch: less padding
    for at in range(0, len(order), lm.batch_size):
        batch = order[at : at + lm.batch_size]
        part = prefix.rows(batch) if prefix is not None else None
        logits = _last_logits(lm, [rows[i] for i in batch], part, injection_layers)
        _require_finite(logits, "logits", [names[i] for i in batch])
        for i, row in zip(batch, log_softmax(logits), strict=True):
            out[i] = row
    return torch.stack([row for row in out if row is not None])


def _last_logits(
    lm: LanguageModel, rows: Sequence[Ids], prefix: PrefixBatch | None, injection_layers: frozenset[int] | None
) -> torch.Tensor:
    ids, mask, positions = _left_padded(rows, lm.device)
    if prefix is None:
        return lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits[
            :, -1
        ]
    full = torch.cat([prefix.visible.to(mask.dtype), mask], dim=1)
    if full.shape[1] != prefix.slots + ids.shape[1]:
        raise AssertionError(f"mask covers {full.shape[1]} of {prefix.slots} + {ids.shape[1]} positions")
    hidden = HiddenPrefix(prefix.slots, injection_layers) if injection_layers is not None else None
    with hiding(hidden):
        return lm.model(
            input_ids=ids,
            attention_mask=full,
            position_ids=positions + prefix.query_start[:, None],
            past_key_values=prefix.fresh_cache(),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


@torch.inference_mode()
def read_teacher(
    lm: LanguageModel,
    demos: Sequence[Ids],
    queries: Sequence[Ids],
    names: Sequence[str],
    reader: AttentionReader,
    keep_cache: bool,
) -> TeacherReading:
    """One pass over demo + query for at most ``batch_size`` samples: distribution, attention, and the demo's K/V.

    Args:
        reader: which attention to read; it is filled and becomes part of the reading.
        keep_cache: also keep the demo's K/V (needed by gather and causal drop).
    """
    ids, mask, positions = _left_padded([tuple(d) + tuple(q) for d, q in zip(demos, queries, strict=True)], lm.device)
    demo_lengths, query_lengths = [len(d) for d in demos], [len(q) for q in queries]
    offsets = [ids.shape[1] - d - q for d, q in zip(demo_lengths, query_lengths, strict=True)]
    with reading(reader):
        output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=keep_cache, logits_to_keep=1)
    reader.require_complete()
    _require_finite(output.logits[:, -1], "teacher logits", names)
    prefix = None
    if keep_cache:
        keys, values = read_cache(output.past_key_values)
        longest = max(o + d for o, d in zip(offsets, demo_lengths, strict=True))
        slot = torch.arange(longest, device=lm.device)[None]
        start = torch.tensor(offsets, device=lm.device)[:, None]
        length = torch.tensor(demo_lengths, device=lm.device)
        prefix = PrefixBatch(
            tuple(k[:, :, :longest] for k in keys),
            tuple(v[:, :, :longest] for v in values),
            (slot >= start) & (slot < start + length[:, None]),
            length,
        )
    logprobs = log_softmax(output.logits[:, -1])
    return TeacherReading(logprobs, prefix, offsets, demo_lengths, query_lengths, reader, list(names))


@torch.inference_mode()
def prefill(lm: LanguageModel, rows: Sequence[Ids], positions: Sequence[Ids], names: Sequence[str]) -> tuple[Layers, Layers]:
    """Run tokens through the model at given positions, without the vocabulary projection.

    Returns:
        Keys and values, one (B, H_kv, T, D_h) tensor a layer, rows aligned at their start; what is beyond a row's
        length is padding and means nothing.

    Raises:
        NumericsError: a key or value of a row is not finite.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    at = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (tokens, places) in enumerate(zip(rows, positions, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        at[row, : len(tokens)] = torch.tensor(places)
        mask[row, : len(tokens)] = 1
    output = lm.model.base_model(
        input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), position_ids=at.to(lm.device), use_cache=True
    )
    keys, values = read_cache(output.past_key_values)
    _require_finite(keys[-1], "keys", names)
    _require_finite(values[-1], "values", names)
    return keys, values
