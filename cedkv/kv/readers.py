"""Readings computed inside attention calls: what ``kv.readings`` defines, from one layer's queries, keys and values.

Nothing here holds a T x T matrix: query rows are computed ``ROW_CHUNK`` at a time and reduced at once, on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, pad

from cedkv.core.errors import ModelError
from cedkv.kv.attention import ROW_CHUNK, AttentionCall
from cedkv.kv.readings import ExpectedAttention, Reading, ReceivedAttention, RowAttention, SpanDrop, ValueNorm
from cedkv.kv.rope import RopeLayout, mean_rotation, rerotate_keys
from cedkv.kv.transfers import index_on, upload

Grams = Mapping[int, torch.Tensor]
"""Layer -> W_o^T W_o of every query head, (H_q, D_h, D_h) float32: ||W_o v||^2 = v^T W_o^T W_o v."""


@dataclass(frozen=True)
class PassRows:
    """What the rows of a pass are.

    query_rows: per row, how many of the last tokens are the query's.
    demo: per row, the slots ``[start, end)`` of its demo among the keys.
    after: columns behind the queries, of tokens that are given after them: readers see neither their rows nor their keys.
    input_norms: attention module -> (B, T_q) norms of its input, where they are measured.
    counts: window and device -> ``_counts``, the same in all layers of the pass.
    """

    query_rows: Sequence[int]
    demo: Sequence[tuple[int, int]]
    after: int = 0
    input_norms: dict[Any, torch.Tensor] = field(default_factory=dict)
    counts: dict[tuple[int | None, torch.device], tuple[torch.Tensor, int]] = field(default_factory=dict)


class LayerReader(ABC):
    """Computes readings from one attention call: reading -> (B, H, T) float32, by key slot."""

    @abstractmethod
    def read(self, call: AttentionCall, rows: PassRows) -> dict[Reading, torch.Tensor]:
        """Return the readings of one layer."""


@dataclass(frozen=True)
class AttentionRows(LayerReader):
    """Attention of query rows, for any number of windows and poolings from one computation of the rows."""

    readings: frozenset[RowAttention]

    def read(self, call: AttentionCall, rows: PassRows) -> dict[Reading, torch.Tensor]:
        pooled: dict[Reading, torch.Tensor] = {}
        counts = {r: _counts(r.window, rows, call) for r in self.readings}
        for start, attention in _query_attention(call, max(most for _, most in counts.values())):
            stop = start + attention.shape[2]
            from_end = call.query.shape[2] - torch.arange(start, stop, device=attention.device)
            for reading, (count, _) in counts.items():
                weight = (from_end[None] <= count[:, None]).float()
                if reading.over_input:
                    norms = rows.input_norms[call.module][:, start:stop].to(weight.device)
                    weight = torch.where(weight > 0, weight / norms, 0)  # a padding token's norm may be 0
                if reading.pooling == "mean":
                    part = torch.einsum("bhwt,bw->bht", attention, weight / count[:, None])
                    pooled[reading] = pooled[reading] + part if reading in pooled else part
                else:
                    part = (attention * weight[:, None, :, None]).amax(dim=2)
                    pooled[reading] = torch.maximum(pooled[reading], part) if reading in pooled else part
        return pooled


@dataclass(frozen=True)
class Received(LayerReader):
    """Attention received from all later tokens, divided by their number."""

    def read(self, call: AttentionCall, rows: PassRows) -> dict[Reading, torch.Tensor]:
        device, length = call.key.device, call.key.shape[2]
        received = torch.zeros(*call.query.shape[:2], length, device=device)
        for start, attention in _query_attention(call, call.query.shape[2]):
            positions = torch.arange(start, start + attention.shape[2], device=device)
            attention[:, :, positions - start, positions] = 0  # attention of a position to itself is not from a later one
            received += attention.sum(dim=2)
        later = (length - 1 - torch.arange(length, device=device)).clamp_min(1)
        return {ReceivedAttention(): received / later}


@dataclass(frozen=True, eq=False)
class ValueNorms(LayerReader):
    """||W_o v_j|| of every key slot and query head, by the Gram matrix of each head's slice of W_o."""

    grams: Grams

    def read(self, call: AttentionCall, rows: PassRows) -> dict[Reading, torch.Tensor]:
        return {ValueNorm(): value_norms(call.value, self.grams[call.layer])}


def value_norms(value: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return ||W_o v||, (B, H_q, T) float32.

    Args:
        value: (B, H_kv, T, D_h).
        gram: (H_q, D_h, D_h), see ``Grams``.
    """
    kv_heads = value.shape[1]
    grouped = gram.to(value.device).reshape(kv_heads, -1, *gram.shape[1:])
    squares = torch.einsum("bktd,kgde,bkte->bkgt", value.float(), grouped, value.float())
    return squares.clamp_min(0).sqrt().flatten(1, 2)


@dataclass(frozen=True, eq=False)
class SpanDrops(LayerReader):
    """The closed form of ``SpanDrop``; one head in the result, because heads are summed.

    With r = sum over j outside S of A_ij v_j, o_i - v_S = r - (1 - p_S) v_S. Where nearly all attention is on the span this
    and 1 - p_S are taken from the tokens outside it: a difference of two numbers near 1 would be rounding.
    """

    reading: SpanDrop
    grams: Grams

    def read(self, call: AttentionCall, rows: PassRows) -> dict[Reading, torch.Tensor]:
        length = self.reading.span_len
        heads, slots = call.query.shape[1], call.key.shape[2]
        value = call.value.float().repeat_interleave(heads // call.value.shape[1], dim=1)
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)  # the last column sums the weights themselves
        gram = self.grams[call.layer].to(value.device)
        moved = value.new_zeros(value.shape[0], 1, slots)
        if slots < length:
            return {self.reading: moved}
        counts, most = _counts(self.reading.window, rows, call)
        for start, attention in _query_attention(call, most):
            for i in range(attention.shape[2]):
                counted = (call.query.shape[2] - (start + i) <= counts).float()
                weights = attention[:, :, i]  # (B, H, T)
                weighted = (weights[..., None] * value).transpose(2, 3)  # (B, H, D + 1, T)
                inside = avg_pool1d(weighted.flatten(1, 2), length, 1) * length
                inside = inside.reshape(len(inside), heads, -1, inside.shape[-1]).transpose(2, 3)  # (B, H, starts, D + 1)
                before = pad(weighted.cumsum(dim=-1), (1, 0))[..., : slots - length + 1]
                after = pad(weighted.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))[..., length:]
                outside = (before + after).transpose(2, 3)
                share, left = inside[..., -1:], outside[..., -1:]  # p_S, 1 - p_S
                if call.form.sinks is not None:
                    left = left + (1 - weights.sum(dim=-1)).clamp_min(0)[..., None, None]
                change = outside[..., :-1] * share / left.clamp_min(torch.finfo(left.dtype).tiny) - inside[..., :-1]
                squares = torch.einsum("bhsd,hde,bhse->bhs", change, gram, change)
                moved[:, 0, : squares.shape[2]] += squares.clamp_min(0).sqrt().sum(dim=1) * counted[:, None]
        return {self.reading: moved}


@dataclass(frozen=True, eq=False)
class ExpectedAttentions(LayerReader):
    """The expected attention of ``ExpectedAttention``, from the queries and keys of a pass that holds the demo.

    rope: each layer's rotation; None where positions are not rotary.

    Raises:
        ModelError: attention scores are soft-capped.
    """

    reading: ExpectedAttention
    grams: Grams
    rope: Sequence[RopeLayout] | None

    def read(self, call: AttentionCall, rows: PassRows) -> dict[Reading, torch.Tensor]:
        if call.form.softcap is not None:
            raise ModelError(
                f"expected_attention: {type(call.module).__name__} has a soft cap on attention scores; the expectation over a "
                "normal distribution of queries needs scores that are linear in the query. Use another selector, or a model "
                "without a soft cap"
            )
        norms = value_norms(call.value, self.grams[call.layer])
        scores = torch.zeros_like(norms)
        for row, (start, end) in enumerate(rows.demo):
            first = start + min(self.reading.sinks, end - start - 1)
            log_scores = self._logits(call, row, start, first, end)
            sinks = call.form.sinks
            if sinks is not None:
                log_scores = torch.cat([log_scores, sinks.float()[:, None]], dim=1)
            expected = log_scores.softmax(dim=1)[:, : end - first]
            scores[row, :, first:end] = (expected + self.reading.epsilon) * norms[row, :, first:end]
        return {self.reading: scores}

    def _logits(self, call: AttentionCall, row: int, start: int, first: int, end: int) -> torch.Tensor:
        """Return z_j of the demo tokens from ``first`` on, (H_q, tokens)."""
        query = call.query[row, :, first:end].float()
        keys = call.key[row, :, first:end].float().repeat_interleave(query.shape[0] // call.key.shape[1], dim=0)
        mean_turn = None
        if self.rope is not None:
            rope = self.rope[call.layer]
            back = -torch.arange(first - start, end - start, device=query.device)
            query = rerotate_keys(query[None], back[None], rope)[0]
            future = torch.arange(end - start, end - start + self.reading.future)
            mean_turn = upload(mean_rotation(future, rope, query.shape[-1]), query.device)
        mean = query.mean(dim=1)
        centred = query - mean[:, None]
        covariance = centred.transpose(1, 2) @ centred / query.shape[1]
        if mean_turn is not None:
            mean = mean @ mean_turn.T
            covariance = mean_turn @ covariance @ mean_turn.T
        linear = torch.einsum("hd,htd->ht", mean, keys) * call.form.scaling
        return linear + torch.einsum("htd,hde,hte->ht", keys, covariance, keys) * call.form.scaling**2 / 2


def layer_readers(readings: Collection[Reading], grams: Grams, rope: Sequence[RopeLayout] | None) -> tuple[LayerReader, ...]:
    """Return the readers of these readings, of those that are computed in attention calls."""
    readers: list[LayerReader] = []
    row_readings = frozenset(r for r in readings if isinstance(r, RowAttention))
    if row_readings:
        readers.append(AttentionRows(row_readings))
    for reading in readings:
        if isinstance(reading, ReceivedAttention):
            readers.append(Received())
        elif isinstance(reading, ValueNorm):
            readers.append(ValueNorms(grams))
        elif isinstance(reading, SpanDrop):
            readers.append(SpanDrops(reading, grams))
        elif isinstance(reading, ExpectedAttention):
            readers.append(ExpectedAttentions(reading, grams, rope))
    return tuple(readers)


def _counts(window: int | None, rows: PassRows, call: AttentionCall) -> tuple[torch.Tensor, int]:
    """Return how many of each row's last query rows are read, (B,), and the largest of these numbers."""
    key = window, call.query.device
    if key not in rows.counts:
        counts = [n if window is None else min(window, n) for n in rows.query_rows]
        rows.counts[key] = index_on(counts, call.query.device), max(counts)
    return rows.counts[key]


def _query_attention(call: AttentionCall, n: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the attention of the last ``n`` query rows in chunks: first row, (B, H_q, rows, T)."""
    length = call.query.shape[2]
    for start in range(length - n, length, ROW_CHUNK):
        yield start, call.rows(start, min(start + ROW_CHUNK, length))


@dataclass(frozen=True)
class AttentionReader:
    """Reads ``readers`` in ``layers`` while the model runs; ``maps[reading][layer]`` is (B, H, T), by key slot."""

    layers: frozenset[int]
    readers: tuple[LayerReader, ...]
    rows: PassRows = PassRows((), ())
    maps: dict[Reading, dict[int, torch.Tensor]] = field(default_factory=dict)

    @property
    def all_rows(self) -> bool:
        """Whether a reading needs the demo's own query rows: demo and query must then run in one pass."""
        return any(isinstance(reader, Received | ExpectedAttentions) for reader in self.readers)

    @property
    def over_input(self) -> bool:
        """Whether a reading needs the norms of the attention modules' inputs."""
        return any(r.over_input for reader in self.readers if isinstance(reader, AttentionRows) for r in reader.readings)

    def fresh(self, rows: PassRows) -> AttentionReader:
        """Return an empty reader of the same things for another pass."""
        return AttentionReader(self.layers, self.readers, rows)

    def observe(self, call: AttentionCall) -> None:
        """Read one layer's call."""
        if call.layer in self.layers:
            call = call.without_last(self.rows.after)
            for reader in self.readers:
                for reading, scores in reader.read(call, self.rows).items():
                    self.maps.setdefault(reading, {})[call.layer] = scores

    def require_complete(self) -> None:
        """Raise RuntimeError if a layer in scope made no attention call that could be read."""
        missing = {layer for layers in self.maps.values() for layer in self.layers - layers.keys()}
        if self.readers and not self.maps:
            missing = set(self.layers)
        if missing:
            raise RuntimeError(f"no attention was read in layers {sorted(missing)}")


@contextmanager
def measure_inputs(model: torch.nn.Module, norms: dict[Any, torch.Tensor]) -> Iterator[None]:
    """Fill ``norms`` with the norms of what each attention module is given, (B, T_q), while the model runs."""

    def measure(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = options.get("hidden_states", arguments[0] if arguments else None)
        if isinstance(hidden, torch.Tensor):
            norms[module] = hidden.float().norm(dim=-1)

    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    hooks = [module.register_forward_pre_hook(measure, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
