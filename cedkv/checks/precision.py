"""Gate A: are numbers computed and kept in the dtype that the run says?"""

from __future__ import annotations

import numpy as np
import torch

from cedkv.checks.base import CheckInputs, MeasuredCheck
from cedkv.config.schema import Phase2Config
from cedkv.kv.transfers import download, index_on
from cedkv.models.loading import LanguageModel

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
ROUNDINGS = 8
"""Roundings of a dtype that a sum of products may be away from float64, over the sum of their sizes (seen: 1 at most)."""
NARROWER = {
    "float32": (torch.bfloat16, torch.float16),
    "float16": (torch.bfloat16,),
    "bfloat16": (torch.float8_e5m2,),
}
"""Dtypes that hold few of a dtype's numbers exactly: K/V that fit into one were computed or kept in it."""
SOME_OUTPUTS, SOME_TOKENS = 16, 256


class KvPrecision(MeasuredCheck):
    """A narrower dtype cannot hold the K/V exactly.

    Share of K/V numbers that a narrower dtype holds exactly, the larger of demo and prefix; 1 where they are of another
    dtype than the run's. By chance it is 1 in 8 at most.

    Why: K/V that went through a narrower dtype keep its gaps. Cannot see: rounding that is followed by arithmetic in the
    run's dtype.
    """

    name, unit = "kv_precision", "share"

    def limit(self, config: Phase2Config) -> float:
        return 0.5

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        dtype = config.runtime.torch_dtype
        worst = np.zeros(len(inputs.samples))
        for prefix in (inputs.demo, inputs.prefix):
            tensors = [t[:, :, :SOME_TOKENS].flatten(1) for t in (*prefix.keys, *prefix.values)]
            if any(str(tensor.dtype) != f"torch.{dtype}" for tensor in tensors):
                return [1.0] * len(worst)
            nonzero = sum((tensor != 0).sum(dim=1) for tensor in tensors)
            for narrow in NARROWER[dtype]:
                exact = sum(((tensor != 0) & (tensor.to(narrow).to(tensor.dtype) == tensor)).sum(dim=1) for tensor in tensors)
                worst = np.maximum(worst, (exact / nonzero.clamp_min(1)).cpu().numpy())  # type: ignore[union-attr]
        return worst.tolist()


class Arithmetic(MeasuredCheck):
    """Linear layers = float64 to a few roundings.

    Largest |y - W x| over |W| |x| of some outputs of every linear layer, W x in float64, in one pass of the shortest query.
    The limit is ``ROUNDINGS`` times the dtype's epsilon. Nothing is observed where the model has no linear layers of plain
    floating-point weights.

    Why: a model that multiplies in a narrower dtype (autocast, TF32) agrees with itself. Cannot see: everything but linear
    layers: norms, softmax, rotary angles.
    """

    name, unit = "arithmetic", "relative"

    def limit(self, config: Phase2Config) -> float:
        return ROUNDINGS * EPSILON[config.runtime.torch_dtype]

    def expected(self, config: Phase2Config) -> bool:
        return False

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float] | None:
        error: float | None = inputs.cached(self.name, lambda: self._measure(lm, inputs))
        return None if error is None else [error] * len(inputs.samples)

    @torch.inference_mode()
    def _measure(self, lm: LanguageModel, inputs: CheckInputs) -> float | None:
        taken: list[torch.Tensor] = []

        def take(layer: torch.nn.Linear, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.numel():
                return
            some = torch.linspace(0, layer.out_features - 1, min(SOME_OUTPUTS, layer.out_features)).long().tolist()
            outputs = index_on(some, layer.weight.device)
            bias = torch.zeros_like(layer.weight[outputs, 0]) if layer.bias is None else layer.bias[outputs]
            row = arguments[0].reshape(-1, layer.in_features)[-1].clone()  # which the model may go on to change
            taken.extend((row, layer.weight[outputs], bias, output.reshape(-1, layer.out_features)[-1, outputs]))

        plain = [m for m in lm.model.modules() if type(m) is torch.nn.Linear and not m.weight.is_meta]
        hooks = [layer.register_forward_hook(take) for layer in plain if layer.weight.is_floating_point()]
        try:
            ids = torch.tensor([min((sample.base_ids for sample in inputs.samples), key=len)], device=lm.device)
            lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        numbers = [tensor.double() for tensor in download(taken)]
        errors = []
        for row, weight, bias, computed in zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True):
            scale = weight.abs() @ row.abs() + bias.abs()
            errors.append(float(((computed - (weight @ row + bias)).abs() / scale.clamp_min(1e-30)).max()))
        return float(np.max(errors)) if errors else None
