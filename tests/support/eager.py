"""What plain transformers attends to, one unpadded row at a time, with eager attention; nothing of ``cedkv``.

And the readings of ``cedkv.kv.readings`` as loops over it, written from their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Layer:
    """One layer's pass over one row.

    attention: (H_q, T, T) weights. keys, values: (H_kv, T, D_h), keys rotated. inputs: (T, hidden) of the attention module.
    outputs: (T, H_q x D_h), what the output projection is given.
    """

    module: Any
    attention: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor

    @property
    def heads(self) -> int:
        return len(self.attention)

    def value(self, head: int, token: int) -> torch.Tensor:
        """The value that a query head reads of a token, (D_h,)."""
        return self.values[head * len(self.values) // self.heads, token]

    def written(self, head: int, vector: torch.Tensor) -> float:
        """||W_o v||: the norm of what a head writes when its output is this vector and all other heads' are 0."""
        alone = torch.zeros(1, self.heads * len(vector))
        alone[0, head * len(vector) : (head + 1) * len(vector)] = vector
        projection = self.module.o_proj
        return float((projection(alone) - projection(torch.zeros_like(alone))).norm())


class Eager:
    """A model folder under eager attention in float32."""

    def __init__(self, folder: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.blocks = self.model.model.layers

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> list[Layer]:
        """Every layer of one pass over a row."""
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        hooks = [
            hook
            for block in self.blocks
            for hook in (
                block.self_attn.register_forward_pre_hook(
                    lambda _, args, named: inputs.append(named.get("hidden_states", args[0] if args else None)[0]),
                    with_kwargs=True,
                ),
                block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0])),
            )
        ]
        try:
            cache = DynamicCache()
            found = self.model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, output_attentions=True)
        finally:
            for hook in hooks:
                hook.remove()
        return [
            Layer(block.self_attn, found.attentions[i][0], cache.layers[i].keys[0], cache.layers[i].values[0], *seen)
            for i, (block, *seen) in enumerate(zip(self.blocks, inputs, outputs, strict=True))
        ]

    @torch.inference_mode()
    def logprobs(
        self, tokens: Sequence[int], hidden: Sequence[int] = (), from_row: int = 0, positions: Sequence[int] | None = None
    ) -> np.ndarray:
        """Log-probabilities after the last token, in float64; rows from ``from_row`` on do not see ``hidden`` tokens."""
        mask = torch.full((len(tokens), len(tokens)), HIDDEN).triu(diagonal=1)
        mask[from_row:, list(hidden)] = HIDDEN
        places = torch.tensor([list(range(len(tokens)) if positions is None else positions)])
        logits = self.model(torch.tensor([list(tokens)]), attention_mask=mask[None, None], position_ids=places).logits
        return logits[0, -1].double().log_softmax(dim=-1).numpy()

    @contextmanager
    def span_hidden(self, layer: int, start: int, end: int) -> Iterator[None]:
        """Inside the context one layer's attention does not see the tokens ``[start, end)``."""

        def hide(module: Any, args: Any, named: dict[str, Any]) -> Any:
            mask = named["attention_mask"].clone()
            mask[..., start:end] = HIDDEN
            return args, {**named, "attention_mask": mask}

        handle = self.blocks[layer].register_forward_pre_hook(hide, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def rows(
    layer: Layer, demo: range, query: range, window: int | None = None, pooling: str = "mean", over_input: bool = False
) -> torch.Tensor:
    """Attention of a query's last rows to the demo, pooled over rows, (H_q, L)."""
    read = list(query)[-window:] if window else list(query)
    found = torch.zeros(layer.heads, len(demo))
    for head in range(layer.heads):
        for j, token in enumerate(demo):
            values = [
                float(layer.attention[head, i, token]) / (float(layer.inputs[i].norm()) if over_input else 1) for i in read
            ]
            found[head, j] = max(values) if pooling == "max" else sum(values) / len(values)
    return found


def value_norms(layer: Layer, demo: range) -> torch.Tensor:
    """||W_o v_j||, (H_q, L)."""
    return torch.tensor([[layer.written(head, layer.value(head, j)) for j in demo] for head in range(layer.heads)])


def received(layer: Layer, demo: range) -> torch.Tensor:
    """Mean attention from all later tokens, (H_q, L)."""
    length = layer.attention.shape[1]
    return torch.tensor(
        [
            [sum(float(layer.attention[head, i, j]) for i in range(j + 1, length)) / (length - 1 - j) for j in demo]
            for head in range(layer.heads)
        ]
    )


def span_drops(layer: Layer, demo: range, query: range, span_len: int, window: int | None) -> list[float]:
    """Sum over rows and heads of p_S / (1 - p_S) ||W_o (o_i - v_S)||, for every start whose span lies in the demo."""
    read = list(query)[-window:] if window else list(query)
    drops = []
    for start in demo[: len(demo) - span_len + 1]:
        total = 0.0
        for head in range(layer.heads):
            for i in read:
                weights = layer.attention[head, i].double()
                weights = weights if hasattr(layer.module, "sinks") else weights / weights.sum()
                output = sum(weights[j] * layer.value(head, j).double() for j in range(len(weights)))
                share = float(sum(weights[start : start + span_len]))
                if share == 0:  # outside a sliding window
                    continue
                mean = sum(weights[j] * layer.value(head, j).double() for j in range(start, start + span_len)) / share
                total += share / (1 - share) * layer.written(head, (output - mean).float())
        drops.append(total)
    return drops


def rotation(position: int, frequencies: torch.Tensor) -> torch.Tensor:
    """R(p): each pair (i, i + D/2) turned by p times its frequency, (D, D) float64."""
    half = len(frequencies)
    made = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for i in range(half):
        angle = position * float(frequencies[i])
        made[i, i] = made[i + half, i + half] = math.cos(angle)
        made[i, i + half], made[i + half, i] = -math.sin(angle), math.sin(angle)
    return made


def expected_attention(layer: Layer, rope: Any, length: int, future: int, epsilon: float, sinks: int) -> torch.Tensor:
    """(softmax_j(z) + epsilon) ||W_o v_j|| of the demo ``[0, length)``, (H_q, L); queries before RoPE from the module's input.

    Args:
        rope: the model's rotary embedding; YaRN scales queries and keys too.
    """
    dim = layer.keys.shape[-1]
    queries = layer.module.q_proj(layer.inputs).reshape(len(layer.inputs), layer.heads, dim)
    if hasattr(layer.module, "q_norm"):
        queries = layer.module.q_norm(queries)
    queries = queries * rope.attention_scaling
    mean_rotation = sum(rotation(p, rope.inv_freq) for p in range(length, length + future)) / future
    softmax_sinks = getattr(layer.module, "sinks", None)
    found = torch.zeros(layer.heads, length)
    for head in range(layer.heads):
        own = queries[sinks:length, head].double()
        mean = own.mean(dim=0)
        covariance = sum(torch.outer(q - mean, q - mean) for q in own) / len(own)
        keys = layer.keys[head * len(layer.keys) // layer.heads].double()
        scale = layer.module.scaling
        z = [
            float((mean_rotation @ mean) @ keys[j]) * scale
            + float(keys[j] @ mean_rotation @ covariance @ mean_rotation.T @ keys[j]) * scale**2 / 2
            for j in range(sinks, length)
        ]
        extra = [] if softmax_sinks is None else [float(softmax_sinks[head])]
        largest = max(z + extra)
        total = sum(math.exp(value - largest) for value in z + extra)
        for j in range(sinks, length):
            share = math.exp(z[j - sinks] - largest) / total
            found[head, j] = (share + epsilon) * layer.written(head, layer.value(head, j))
    return found


def key_norms(layer: Layer, demo: range) -> torch.Tensor:
    """-||k_j||, (H_kv, L)."""
    return torch.tensor([[-math.sqrt(sum(float(x) ** 2 for x in keys[j])) for j in demo] for keys in layer.keys])


def key_differences(layer: Layer, demo: range) -> torch.Tensor:
    """-cos(k_j, mean of the demo's keys), (H_kv, L)."""
    found = torch.zeros(len(layer.keys), len(demo))
    for head, keys in enumerate(layer.keys):
        mean = sum(keys[j] for j in demo) / len(demo)
        for j in demo:
            found[head, j] = -float(keys[j] @ mean) / max(float(keys[j].norm() * mean.norm()), 1e-8)
    return found


def lag_relative(layer: Layer, demo: range, lag: int, sinks: int) -> torch.Tensor:
    """LagKV's ranks over ``lag``, (H_kv, L); 1 for sinks and for what no partition follows."""
    found = torch.ones(len(layer.keys), len(demo))
    starts = [start for start in range(sinks, len(demo), lag) if start + lag <= len(demo)]
    for head in range(len(layer.keys)):
        for start in starts[:-1]:
            spread = np.zeros(lag)
            for states in (layer.keys[head].double().numpy(), layer.values[head].double().numpy()):
                following = states[start + lag : start + 2 * lag]
                low, high = following.min(axis=0), following.max(axis=0)
                deviation = [((states[start + i] - low) / (high - low)).std(ddof=1) for i in range(lag)]
                spread += np.exp(deviation) / np.exp(deviation).sum()
            for i in range(lag):
                found[head, start + i] = sum(spread[k] < spread[i] for k in range(lag)) / lag
    return found
