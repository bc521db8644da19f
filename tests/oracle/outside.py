"""What a run computes, by other means: plain transformers, one row at a time, and nothing of ``cedkv``.

What a run makes in padded batches with SDPA, with null slots, its own attention rows and its own rotation, is made here
with eager attention, one row, no null slot and no padding, explicit additive masks, keys moved as complex numbers, and
spans by exhaustive search. ``outside_run.py`` holds a finished run against it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

State = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Keys and values, one (1, H_kv, K, D_h) tensor a layer."""
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Rules:
    """How spans were to be chosen: the settings of the run, given by the test that made it.

    query_window: None for all of the query. null_query: tokens of a query whose attention is subtracted.
    """

    span_len: int
    span_budget: int
    min_span_distance: int
    center: bool = False
    keep_sink: int = 0
    query_window: int | None = None
    selection_layers: str = "top25"
    lds_masks: int = 0
    row_pooling: str = "max"
    head_pooling: str = "max"
    layer_pooling: str = "max"
    pooling_kernel: int = 1
    value_weighted: bool = False
    null_query: Sequence[int] | None = None
    off_tokens: int = 8
    free: bool = False
    """The select arm's spans may be anywhere and of any length; those of the random arm may not."""


class Plain:
    """A model folder under eager attention in float32, read one row at a time.

    What depends on tokens and positions alone is computed once: answers without a prefix, and keys and values.
    """

    def __init__(self, folder: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._alone = cache(self._after)
        self._generated = cache(self._generate)
        self._filled = cache(lambda tokens, positions: self.run(tokens, positions).past_key_values.layers)

    @torch.inference_mode()
    def run(
        self, tokens: Sequence[int], start: int | Sequence[int] = 0, state: State | None = None, attentions: bool = False
    ) -> Any:
        """One row over a state, at positions from ``start`` on or at the positions given."""
        past, new = state[0][0].shape[2] if state else 0, len(tokens)
        before = DynamicCache()
        if state:
            for layer, (key, value) in enumerate(zip(*state, strict=True)):
                before.update(key, value, layer)
        mask = torch.full((new, past + new), HIDDEN).triu(diagonal=past + 1)
        return self.model(
            input_ids=torch.tensor([list(tokens)]),
            attention_mask=mask[None, None],
            position_ids=torch.arange(start, start + new)[None] if isinstance(start, int) else torch.tensor([list(start)]),
            past_key_values=before,
            use_cache=True,
            output_attentions=attentions,
        )

    def logprobs(self, tokens: Sequence[int], start: int = 0, state: State | None = None) -> np.ndarray:
        """Log-probabilities after the last token, in float64."""
        return self.after(tokens, (), start, state)[0]

    def after(self, tokens: Sequence[int], given: Sequence[int], start: int = 0, state: State | None = None) -> np.ndarray:
        """Log-probabilities after the last token and after each token given behind it, (1 + given, vocabulary)."""
        if state is None:
            return self._alone(tuple(tokens), tuple(given), start)
        return self._after(tokens, given, start, state)

    def _after(self, tokens: Sequence[int], given: Sequence[int], start: int, state: State | None = None) -> np.ndarray:
        logits = self.run([*tokens, *given], start, state).logits[0, len(tokens) - 1 :].numpy().astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def generate(self, tokens: Sequence[int], n: int) -> list[int]:
        """What transformers' own greedy decoding gives behind the tokens, at most n tokens, the one that ends it included."""
        return list(self._generated(tuple(tokens), n)) if n else []

    def _generate(self, tokens: Sequence[int], n: int) -> list[int]:
        ids = torch.tensor([list(tokens)])
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)
        return made[0, len(tokens) :].tolist()

    @torch.inference_mode()
    def logprobs_without(self, demo: Sequence[int], query: Sequence[int], hidden: Collection[int]) -> np.ndarray:
        """Log-probabilities after the query, whose rows do not see the hidden demo tokens; the demo's own rows do."""
        n = len(demo) + len(query)
        mask = torch.full((n, n), HIDDEN).triu(diagonal=1)
        mask[len(demo) :, sorted(hidden)] = HIDDEN
        output = self.model(
            input_ids=torch.tensor([[*demo, *query]]),
            attention_mask=mask[None, None],
            position_ids=torch.arange(n)[None],
            use_cache=False,
        )
        logits = output.logits[0, -1].numpy().astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    def state(self, demo: Sequence[int], kept: Sequence[int], positions: Sequence[int], kv_source: str) -> State:
        """The prefix of the kept demo tokens, without null slots."""
        if kv_source == "prefill":
            layers = self._filled(tuple(demo[token] for token in kept), tuple(positions))
            return [layer.keys for layer in layers], [layer.values for layer in layers]
        layers = self._filled(tuple(demo), 0)
        theta = self.model.config.rope_parameters["rope_theta"]
        keys = [turned(layer.keys[:, :, kept], np.subtract(positions, kept), theta) for layer in layers]
        return keys, [layer.values[:, :, kept] for layer in layers]

    def scope(self, layers: Sequence[int] | str) -> list[int]:
        """``all``, ``topNN`` (the last NN percent, rounded up), ``midNN`` (as many in the middle) or a list, as numbers."""
        if not isinstance(layers, str):
            return list(layers)
        n = self.model.config.num_hidden_layers
        if layers == "all":
            return list(range(n))
        size = math.ceil(int(layers[3:]) * n / 100)
        return list(range(n - size, n)) if layers.startswith("top") else list(range((n - size) // 2, (n - size) // 2 + size))

    def attention(self, demo: list[int], query: list[int], rules: Rules) -> list[float]:
        """A query's attention to each demo token, pooled over its last tokens, heads, layers in scope and neighbours."""
        found = self.run(demo + query, attentions=True)
        nothing = self.run(demo + list(rules.null_query), attentions=True) if rules.null_query else None
        by_layer = []
        for layer in self.scope(rules.selection_layers):
            by_head = pooled_rows(found.attentions[layer][0], len(demo), rules)
            if nothing is not None:
                by_head = by_head - pooled_rows(nothing.attentions[layer][0], len(demo), rules)
            if rules.value_weighted:
                by_head = by_head * self.written(layer, found.past_key_values.layers[layer].values[0, :, : len(demo)])
            by_layer.append(pooled(by_head, 0, rules.head_pooling))
        scores = pooled(np.stack(by_layer), 0, rules.layer_pooling)
        half = rules.pooling_kernel // 2
        padded = np.concatenate([np.zeros(half), scores, np.zeros(half)])
        return [float(padded[token : token + rules.pooling_kernel].mean()) for token in range(len(demo))]

    def written(self, layer: int, values: torch.Tensor) -> np.ndarray:
        """||W_o v|| of every query head and token, (H_q, L): a head's columns of the output projection's weight times v."""
        weight = self.model.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
        dim = values.shape[-1]
        heads = weight.shape[1] // dim
        norms = [
            [np.linalg.norm(weight[:, head * dim : (head + 1) * dim] @ value) for value in values[head * len(values) // heads]]
            for head, values in ((head, values.double().numpy()) for head in range(heads))
        ]
        return np.array(norms)

    @contextmanager
    def prefix_seen_by(self, layers: list[int], slots: int) -> Iterator[None]:
        """The first ``slots`` keys are masked in every other layer."""

        def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"].clone()
            mask[..., :slots] = HIDDEN
            return args, {**kwargs, "attention_mask": mask}

        blind = [layer for i, layer in enumerate(self.model.model.layers) if i not in layers]
        handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in blind]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def pooled(values: np.ndarray, axis: int, pooling: str) -> np.ndarray:
    """The mean or the largest along an axis."""
    return values.max(axis=axis) if pooling == "max" else values.mean(axis=axis)


def pooled_rows(attention: torch.Tensor, demo_length: int, rules: Rules) -> np.ndarray:
    """Attention of a query's last rows to the demo, (H_q, L), from all of it, (H_q, T, T)."""
    rows = attention[:, demo_length:, :demo_length].double().numpy()
    return pooled(rows if rules.query_window is None else rows[:, -rules.query_window :], 1, rules.row_pooling)


def turned(keys: torch.Tensor, shift: np.ndarray, theta: float) -> torch.Tensor:
    """Rotary keys moved by ``shift`` positions: component i of a key is the complex number (k_i, k_{i + D/2})."""
    wide = keys.double().numpy()
    half = wide.shape[-1] // 2
    angle = np.asarray(shift)[:, None] * theta ** (-np.arange(half) / half)
    moved = (wide[..., :half] + 1j * wide[..., half:]) * np.exp(1j * angle)
    return torch.from_numpy(np.concatenate([moved.real, moved.imag], axis=-1)).float()


def divergence(student: np.ndarray, reference: np.ndarray) -> float:
    """KL(student || reference) in nats."""
    return float(np.sum(np.exp(student) * (student - reference)))


def labels(kinds: Sequence[str], demo: Sequence[int], answer: int) -> list[int]:
    """The answers to choose among: each answer of the demo by its first token, and this sample's; one alone is none."""
    known, inside = {answer}, False
    for kind, token in zip(kinds, demo, strict=True):
        if kind == "answer" and not inside:
            known.add(token)
        inside = kind == "answer"
    return sorted(known) if len(known) > 1 else []


def among(logprobs: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities given that the next token is one of these."""
    chosen = logprobs[list(tokens)]
    return chosen - np.log(np.exp(chosen).sum())


def starts(kinds: Sequence[str], rules: Rules) -> list[int]:
    """Where a span may start: inside the demo, not on BOS, with an input or delimiter token at its start (or center)."""
    at = rules.span_len // 2 if rules.center else 0
    inside = [start for start in range(len(kinds)) if start + rules.span_len <= len(kinds) and kinds[start] != "bos"]
    return [start for start in inside if kinds[start + at] in ("input", "delimiter")]


def best_starts(kinds: Sequence[str], scores: Sequence[float], rules: Rules) -> list[int]:
    """The greedy choice by mean score (token 0 not counted), searched anew for every span."""
    chosen: list[int] = []
    left = starts(kinds, rules)

    def mean(start: int) -> float:
        inside = [scores[token] for token in range(start, start + rules.span_len) if token > 0]
        return sum(inside) / len(inside) if inside else 0.0

    while left and len(chosen) < rules.span_budget:
        best = max(left, key=lambda start: (mean(start), -start))
        chosen.append(best)
        left = [start for start in left if abs(start - best) >= rules.min_span_distance]
    return sorted(chosen)
