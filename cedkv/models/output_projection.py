"""The output projection W_o of every layer: what a head's value writes into the residual stream.

Scores that weigh values need ||W_o v||. The projection is found by its name in the attention module, before weights are loaded,
and on the loaded model its input is compared with the attention output, so that a model that does something in between (a gate)
is rejected and not scored wrongly.
"""

from __future__ import annotations

from typing import Any

import torch

from cedkv.core.errors import ModelError
from cedkv.kv.attention import AttentionCall, observe_attention
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import ModelSpec

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names that transformers' decoders give to their output projection."""
PROBE_TOKENS = 8
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest relative difference between the projection's input and the attention output, by dtype."""


def projections(model: Any) -> dict[int, torch.nn.Module]:
    """Return layer -> its output projection, for the layers where one is found; works on a model without weights too."""
    found = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        children = dict(module.named_children())
        name = next((name for name in NAMES if name in children), None)
        if isinstance(layer, int) and name is not None and layer not in found:
            found[layer] = children[name]
    return found


def unsupported_projection(spec: ModelSpec) -> str | None:
    """Return why W_o is not known for a model, by the names of its modules, without its weights; None where it is."""
    missing = sorted(set(range(spec.capabilities.n_layers)) - projections(spec.skeleton).keys())
    return f"its attention in layer {missing[0]} has no {', '.join(NAMES)}" if missing else None


def grams(lm: LanguageModel) -> dict[int, torch.Tensor]:
    """Return layer -> W_o^T W_o of every query head's slice, (H_q, D_h, D_h) float32; measured once per model.

    Raises:
        ModelError: a layer's output projection is not found, or its input is not the attention output.
    """
    if "grams" not in lm.measured:
        lm.measured["grams"] = _measure(lm)
    found: dict[int, torch.Tensor] = lm.measured["grams"]
    return found


class _Shapes:
    """Keeps heads, head dimension and attention output of every call."""

    def __init__(self) -> None:
        self.outputs: dict[int, torch.Tensor] = {}

    def observe(self, call: AttentionCall) -> None:
        value = call.value.float().repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
        self.outputs[call.layer] = (call.rows(0, call.query.shape[2]) @ value).transpose(1, 2)  # (B, T, H_q, D_h)


@torch.inference_mode()
def _measure(lm: LanguageModel) -> dict[int, torch.Tensor]:
    found, shapes = projections(lm.model), _Shapes()
    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, layer=layer: inputs.update({layer: arguments[0]}))
        for layer, module in found.items()
    ]
    try:
        ids = torch.arange(PROBE_TOKENS, device=lm.device)[None] % lm.vocabulary
        with observe_attention(shapes):
            lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    by_layer = {}
    for layer, output in shapes.outputs.items():
        heads, dim = output.shape[2:]
        given = inputs.get(layer)
        expected = output.flatten(2)
        if given is None or given.shape[-1] != heads * dim or _differ(given.reshape(expected.shape), expected, lm):
            raise ModelError(
                f"{lm.meta['model_id']}: the output projection of layer {layer} is not given the attention output itself, so "
                "||W_o v|| is not what a value writes; use a score that does not weigh values (select.value_weighting=none)"
            )
        units = torch.eye(heads * dim, dtype=given.dtype, device=given.device)
        module = found[layer]
        weight = (module(units) - module(torch.zeros_like(units[:1]))).float().reshape(heads, dim, -1)
        by_layer[layer] = weight @ weight.transpose(1, 2)
    return by_layer


def _differ(given: torch.Tensor, expected: torch.Tensor, lm: LanguageModel) -> bool:
    distance = (given.float() - expected).abs().max() / expected.abs().max()
    return not float(distance) <= TOLERANCE[lm.meta["torch_dtype"]]
