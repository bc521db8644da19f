"""Attention with two additions: reading a few rows, and layers that do not see the prefix.

Registered with transformers' own attention interface under the name ``cedkv``; it is ``sdpa`` in everything else. What a
forward pass should read or hide is said by a context around the call, so the model object carries no state.

A row is recomputed from q and k, softmax(q k^T * scaling + mask) in float32, for the last ``window`` positions alone: no
T x T matrix is ever made, and the model never runs in eager mode. A test holds it to eager attention at 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "cedkv"


@dataclass
class RowReader:
    """Collects attention rows of the layers in ``layers``; ``mean()`` gives them averaged over heads and layers."""

    layers: frozenset[int]
    window: int
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)

    def read(self, layer: int, rows: torch.Tensor) -> None:
        self._sums[layer] = rows.mean(dim=1)

    def mean(self) -> torch.Tensor:
        """(B, window, T) float32: attention of the last ``window`` positions to every position.

        Raises:
            RuntimeError: a layer in scope made no attention call that could be read.
        """
        missing = self.layers - set(self._sums)
        if missing:
            raise RuntimeError(f"no attention was read in layers {sorted(missing)}")
        return torch.stack([self._sums[layer] for layer in sorted(self._sums)]).mean(dim=0)


@dataclass(frozen=True)
class HiddenPrefix:
    """The first ``slots`` keys and values are invisible in every layer that is not in ``visible_layers``."""

    slots: int
    visible_layers: frozenset[int]


_reader: ContextVar[RowReader | None] = ContextVar("cedkv_row_reader", default=None)
_hidden: ContextVar[HiddenPrefix | None] = ContextVar("cedkv_hidden_prefix", default=None)


@contextmanager
def reading(reader: RowReader) -> Iterator[RowReader]:
    """Forward passes inside the context fill ``reader``."""
    token = _reader.set(reader)
    try:
        yield reader
    finally:
        _reader.reset(token)


@contextmanager
def hiding(hidden: HiddenPrefix | None) -> Iterator[None]:
    """Forward passes inside the context hide a prefix from some layers."""
    token = _hidden.set(hidden)
    try:
        yield
    finally:
        _hidden.reset(token)


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, window: int
) -> torch.Tensor:
    """Attention of the last ``window`` queries, (B, H_q, window, T) in float32.

    Args:
        query: (B, H_q, T_q, D_h), rotated.
        key: (B, H_kv, T, D_h), rotated; H_q is a multiple of H_kv.
        mask: (B, 1, T_q, T) boolean (True = visible) or additive; None means causal with the last query seeing all.
    """
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    last = query[:, :, -window:].float().reshape(batch, kv_heads, heads // kv_heads, -1, dim)
    scores = torch.einsum("bkgwd,bktd->bkgwt", last, key.float()) * scaling
    scores = scores.reshape(batch, heads, -1, length)
    rows = scores.shape[2]
    if mask is None:
        position = torch.arange(length, device=key.device)
        scores = scores.masked_fill(position[None, :] > position[-rows:, None], float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, -rows:, :length], float("-inf"))
    else:
        scores = scores + mask[:, :, -rows:, :length].float()
    return scores.softmax(dim=-1)


def cedkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls in every layer; shapes as in ``attention_rows``."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    hidden, reader = _hidden.get(), _reader.get()
    if hidden is not None and layer not in hidden.visible_layers:
        if attention_mask is None and query.shape[2] > 1:
            raise RuntimeError("a prefix can only be hidden from a layer when the attention mask is explicit")
        key, value = key[:, :, hidden.slots :], value[:, :, hidden.slots :]
        attention_mask = None if attention_mask is None else attention_mask[..., hidden.slots :]
    if reader is not None and layer in reader.layers:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        reader.read(layer, attention_rows(query, key, attention_mask, scaling, reader.window))
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def register() -> str:
    """Make ``attn_implementation="cedkv"`` known to transformers; returns the name. Calling it twice does no harm."""
    AttentionInterface.register(NAME, cedkv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
