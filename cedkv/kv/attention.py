"""Attention with two additions: reading a few rows, and layers that do not see the prefix.

Registered with transformers' own attention interface under the name ``cedkv``; it is ``sdpa`` in everything else, but for
capped scores (Gemma 2) and attention sinks (gpt-oss), which sdpa does not have and which are computed here. What a forward
pass should read or hide is said by a context around the call, so the model object carries no state.

Rows are recomputed from q and k, softmax(q k^T * scaling + mask) in float32, a few at a time: no T x T matrix is ever
made, and the model never runs in eager mode. A test holds them to eager attention at 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cedkv.core.errors import ModelError

NAME = "cedkv"
ROW_CHUNK = 128
"""Rows of attention held at once where all of them are summed."""


@dataclass(frozen=True)
class ScoreForm:
    """How scores are made of q and k, and weights of scores.

    scaling: q k is multiplied by it.
    softcap: scores become softcap * tanh(scores / softcap), before the mask; None: they stay as they are.
    sinks: (H_q,) a score by head that takes its share of the softmax and has no value; None: there is none.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


@dataclass
class AttentionReader:
    """Collects attention in the layers it names, averaged over heads, while a forward pass runs.

    layers: where the last ``window`` rows are read; ``rows[layer]`` is (B, window, T).
    accumulate: where the attention each position receives is summed over all rows; ``received[layer]`` is (B, T).
    """

    layers: frozenset[int]
    window: int
    accumulate: frozenset[int] = frozenset()
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    received: dict[int, torch.Tensor] = field(default_factory=dict)

    def again(self) -> AttentionReader:
        """A reader of the same attention for another pass, empty."""
        return AttentionReader(self.layers, self.window, self.accumulate)

    def read(self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, form: ScoreForm) -> None:
        """Read one layer's attention; arguments as in ``attention_rows``."""
        if layer in self.layers:
            window = min(self.window, query.shape[2])
            self.rows[layer] = attention_rows(query, key, mask, form, query.shape[2] - window, query.shape[2]).mean(1)
        if layer in self.accumulate:
            self.received[layer] = torch.zeros(key.shape[0], key.shape[2], device=key.device)
            for start in range(0, query.shape[2], ROW_CHUNK):
                stop = min(start + ROW_CHUNK, query.shape[2])
                rows = attention_rows(query, key, mask, form, start, stop).mean(1)
                at = torch.arange(start, stop, device=key.device)
                rows[:, at - start, at] = 0  # what a position gives to itself is not received from a later one
                self.received[layer] += rows.sum(dim=1)

    def require_complete(self) -> None:
        """Raise RuntimeError when a layer in scope made no attention call that could be read."""
        missing = (self.layers - set(self.rows)) | (self.accumulate - set(self.received))
        if missing:
            raise RuntimeError(f"no attention was read in layers {sorted(missing)}")


@dataclass(frozen=True)
class HiddenPrefix:
    """The first ``slots`` keys and values are invisible in every layer that is not in ``visible_layers``."""

    slots: int
    visible_layers: frozenset[int]


_FOREIGN = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of an attention call that change what is attended to in ways unknown here."""

_reader: ContextVar[AttentionReader | None] = ContextVar("cedkv_attention_reader", default=None)
_hidden: ContextVar[HiddenPrefix | None] = ContextVar("cedkv_hidden_prefix", default=None)


@contextmanager
def capture_attention(reader: AttentionReader) -> Iterator[AttentionReader]:
    """Forward passes inside the context fill ``reader``."""
    token = _reader.set(reader)
    try:
        yield reader
    finally:
        _reader.reset(token)


@contextmanager
def hide_prefix(hidden: HiddenPrefix | None) -> Iterator[None]:
    """Forward passes inside the context hide a prefix from some layers."""
    token = _hidden.set(hidden)
    try:
        yield
    finally:
        _hidden.reset(token)


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, form: ScoreForm, start: int, stop: int
) -> torch.Tensor:
    """Attention of the queries ``[start, stop)``, (B, H_q, stop - start, T) in float32; a row that sees nothing is 0.

    Args:
        query: (B, H_q, T_q, D_h), rotated.
        key: (B, H_kv, T, D_h), rotated; H_q is a multiple of H_kv.
        mask: (B, 1, T_q, T) boolean (True = visible) or additive; None means causal with the last query seeing all.
    """
    batch, heads, length_q, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    part = query[:, :, start:stop].float().reshape(batch, kv_heads, heads // kv_heads, -1, dim)
    scores = torch.einsum("bkgwd,bktd->bkgwt", part, key.float()) * form.scaling
    scores = scores.reshape(batch, heads, -1, length)
    if form.softcap is not None:
        scores = form.softcap * (scores / form.softcap).tanh()
    if mask is None:
        position = torch.arange(length, device=key.device)
        visible = (position[None, :] <= (position[length - length_q :])[start:stop, None])[None, None]
    else:
        mask = mask[:, :, start:stop, :length]
        if mask.dtype != torch.bool:
            scores, visible = scores + mask.float(), torch.ones((), dtype=torch.bool, device=key.device)
        else:
            visible = mask
    scores = scores.masked_fill(~visible, float("-inf"))
    if form.sinks is not None:
        sink = form.sinks.float().reshape(1, heads, 1, 1).expand(batch, heads, scores.shape[2], 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0)  # softmax over nothing is NaN


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, form: ScoreForm
) -> torch.Tensor:
    """(B, T_q, H_q, D_v): attention written out, a few rows at a time."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    chunks = []
    for start in range(0, query.shape[2], ROW_CHUNK):
        rows = attention_rows(query, key, mask, form, start, min(start + ROW_CHUNK, query.shape[2]))
        chunks.append(rows.to(value.dtype) @ value)
    return torch.cat(chunks, dim=2).transpose(1, 2).contiguous()


def cedkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls in every layer; shapes as in ``attention_rows``.

    Raises:
        ModelError: the layer attends in a way that is unknown here.
    """
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise ModelError(
            f"{type(module).__name__} gives {', '.join(foreign)} to its attention, which changes what is attended to in a way "
            "unknown here; use a decoder with plain attention (Llama, Qwen2, Qwen3, Mistral, ...)"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    hidden, reader = _hidden.get(), _reader.get()
    form = ScoreForm(kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.pop("softcap", None), kwargs.pop("s_aux", None))
    if hidden is not None and layer not in hidden.visible_layers:
        if attention_mask is None and query.shape[2] > 1:
            raise RuntimeError("a prefix can only be hidden from a layer when the attention mask is explicit")
        key, value = key[:, :, hidden.slots :], value[:, :, hidden.slots :]
        attention_mask = None if attention_mask is None else attention_mask[..., hidden.slots :]
    if reader is not None:
        reader.read(layer, query, key, attention_mask, form)
    if not form.plain:
        return _explicit(query, key, value, attention_mask, form), None
    grouped = attention_mask is not None and query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cpu":
        # transformers repeats K/V for every query head where there is a mask; on CPUs sdpa reads grouped heads as they are
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def register() -> str:
    """Make ``attn_implementation="cedkv"`` known to transformers; returns the name. Calling it twice does no harm."""
    AttentionInterface.register(NAME, cedkv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
