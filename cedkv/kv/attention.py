"""Attention with two additions: an observer sees every call, and the prefix is hidden from some layers.

Registered with transformers' attention interface under the name ``cedkv``. It is ``sdpa`` in everything else, except for
soft-capped scores (Gemma 2) and attention sinks (gpt-oss), which sdpa lacks and which are computed here. A context manager
around the forward pass says who observes and what to hide, so the model object carries no state.

Rows are recomputed from q and k, softmax(q k^T * scaling + mask) in float32 (Vaswani et al. 2017, eq. 1), a few at a time: no
T x T matrix is materialised, and the model never runs in eager mode. A test compares the rows with eager attention at 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cedkv.core.errors import ModelError

NAME = "cedkv"
ROW_CHUNK = 128
"""Query rows whose attention is held at once where many rows are reduced."""


@dataclass(frozen=True)
class ScoreForm:
    """How attention scores follow from q and k, and attention weights from the scores.

    scaling: factor on q k^T.
    softcap: scores become softcap * tanh(scores / softcap), before the mask; None for no cap.
    sinks: (H_q,) a score per head that takes part in the softmax and has no value; None for no sinks.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def supported_by_sdpa(self) -> bool:
        """True where sdpa computes these weights: neither a cap nor sinks."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention call; shapes as in ``attention_rows``, ``value`` is (B, H_kv, T, D_v)."""

    layer: int
    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    form: ScoreForm

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the attention weights of the query rows ``[start, stop)``, (B, H_q, rows, T)."""
        return attention_rows(self.query, self.key, self.mask, self.form, start, stop)

    def without_last(self, n: int) -> AttentionCall:
        """Return the call as it would be without its last ``n`` tokens, which no token before them sees."""
        if n == 0:
            return self
        query, key, value = (tensor[:, :, :-n] for tensor in (self.query, self.key, self.value))
        mask = None if self.mask is None else self.mask[:, :, :-n, : key.shape[2]]
        return replace(self, query=query, key=key, value=value, mask=mask)


class CallObserver(Protocol):
    """What sees every attention call while a forward pass runs."""

    def observe(self, call: AttentionCall) -> None:
        """Take one layer's call."""


@dataclass(frozen=True)
class HiddenPrefix:
    """Hides the first ``slots`` keys and values from every layer that is not in ``visible_layers``."""

    slots: int
    visible_layers: frozenset[int]


_UNSUPPORTED_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of an attention call that change what is attended to in ways not supported here."""

_observer: ContextVar[CallObserver | None] = ContextVar("cedkv_attention_observer", default=None)
_hidden: ContextVar[HiddenPrefix | None] = ContextVar("cedkv_hidden_prefix", default=None)
_sinks: ContextVar[bool] = ContextVar("cedkv_sinks", default=True)


@contextmanager
def observe_attention(observer: CallObserver) -> Iterator[None]:
    """Show ``observer`` every attention call of the forward passes inside the context."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextmanager
def hide_prefix(hidden: HiddenPrefix | None) -> Iterator[None]:
    """Let forward passes inside the context hide a prefix from some layers; None hides nothing."""
    token = _hidden.set(hidden)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def without_sinks() -> Iterator[None]:
    """Let forward passes inside the context leave attention sinks out.

    A token that runs alone then gives its own value to the next layer, exactly, at every position. With a sink it gives a
    share of it, which depends on how its score was rounded.
    """
    token = _sinks.set(False)
    try:
        yield
    finally:
        _sinks.reset(token)


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, form: ScoreForm, start: int, stop: int
) -> torch.Tensor:
    """Return the attention weights of the query rows ``[start, stop)``.

    softmax(q k^T * scaling + mask), Vaswani et al. 2017, eq. 1; with ``form.sinks`` the softmax has one more column per head,
    which is dropped afterwards.

    Args:
        query: (B, H_q, T_q, D_h), rotated.
        key: (B, H_kv, T, D_h), rotated; H_q is a multiple of H_kv.
        mask: (B, 1, T_q, T) boolean (True = visible) or additive; None means causal, the last query sees all keys.

    Returns:
        (B, H_q, stop - start, T) in float32; a row that sees no key is 0.
    """
    batch, heads, length_q, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    query_rows = query[:, :, start:stop].float().reshape(batch, kv_heads, heads // kv_heads, -1, dim)
    scores = torch.einsum("bkgwd,bktd->bkgwt", query_rows, key.float()) * form.scaling
    scores = scores.reshape(batch, heads, -1, length)
    if form.softcap is not None:
        scores = form.softcap * (scores / form.softcap).tanh()
    if mask is None:
        positions = torch.arange(length, device=key.device)
        visible = (positions[None, :] <= (positions[length - length_q :])[start:stop, None])[None, None]
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


def _attention_in_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, form: ScoreForm
) -> torch.Tensor:
    """Return the attention output, (B, T_q, H_q, D_v), from weights computed a few query rows at a time."""
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
    """Compute the attention of one layer; transformers calls this function in every layer.

    Args:
        module: the attention module; ``layer_idx`` is its layer.
        query, key, attention_mask: as in ``attention_rows``.
        value: (B, H_kv, T, D_v).

    Returns:
        The output, (B, T_q, H_q, D_v), and None in place of the weights.

    Raises:
        ModelError: the layer attends in a way that is not supported here.
        RuntimeError: a prefix is hidden from this layer, and the mask is implicit.
    """
    unsupported = [name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]
    if unsupported:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(unsupported)} to its attention, which changes what is attended to in "
            "a way not supported here; use a decoder with standard attention (Llama, Qwen2, Qwen3, Mistral, ...)"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    hidden, observer = _hidden.get(), _observer.get()
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    form = ScoreForm(kwargs.get("scaling") or query.shape[-1] ** -0.5, softcap, sinks if _sinks.get() else None)
    if hidden is not None and layer not in hidden.visible_layers:
        if attention_mask is None and query.shape[2] > 1:
            raise RuntimeError("a prefix can only be hidden from a layer when the attention mask is explicit")
        key, value = key[:, :, hidden.slots :], value[:, :, hidden.slots :]
        attention_mask = None if attention_mask is None else attention_mask[..., hidden.slots :]
    if observer is not None:
        observer.observe(AttentionCall(layer, module, query, key, value, attention_mask, form))
    if not form.supported_by_sdpa:
        return _attention_in_chunks(query, key, value, attention_mask, form), None
    masked_gqa = attention_mask is not None and query.shape[1] != key.shape[1]
    if masked_gqa and query.device.type == "cpu":
        # With a mask, transformers repeats K/V for every query head; on CPUs sdpa can read grouped heads without the copy.
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def register() -> str:
    """Register ``attn_implementation="cedkv"`` with transformers and return the name; calling this again is harmless."""
    AttentionInterface.register(NAME, cedkv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
