"""Find weights that are no weights: not finite, one value only, zero rows, quantised numbers without their scale.

Model and suite compute alike with such weights, so no comparison of the two can see them. What is looked for no training leaves
behind: biases of zeros and normalisations of ones are as they should be, and so are rows of the vocabulary without a token.
"""

from __future__ import annotations

from typing import Any

import torch

from cedkv.models.fingerprint import read_weight

ZERO_ROWS = 0.1
"""Share of rows of zeros in a matrix beyond which it counts as read in part."""
LARGEST_RMS = 20.0
"""Root mean square of a matrix beyond which it holds quantised numbers; of trained and of freshly drawn ones it is below 5."""


def weight_faults(model: Any, tokens: int) -> list[str]:
    """Return ``name: what is wrong`` for every weight that is no weight; 0.1 s at 135M parameters in float32.

    Args:
        tokens: number of tokens of the tokenizer; rows of the vocabulary beyond them may be zero.
    """
    faults = []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for name, parameter in model.named_parameters():
        weight = read_weight(model, name) if parameter.is_meta else parameter.detach()
        if not weight.is_floating_point():
            continue  # packed by a quantisation method, whose scales are weights of their own
        if weight.ndim > 1 and weight.shape[0] == vocabulary:
            weight = weight[:tokens]
        fault = _fault(name, weight)
        if fault is not None:
            faults.append(f"{name}: {fault}")
    return faults


def _fault(name: str, weight: torch.Tensor) -> str | None:
    """Return what is wrong with a weight, of any shape; None if nothing is. Reads it once unless something looks wrong."""
    quantised = weight.dtype.itemsize == 1
    if quantised or weight.ndim < 2:
        weight = weight.float()
    norms = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32 if weight.dtype == torch.float16 else None)
    if not norms.isfinite().all() and not weight.isfinite().all():
        return f"{int((~weight.isfinite()).sum())} of {weight.numel()} values are not finite"
    if weight.ndim < 2:
        return None
    first = weight.flatten()[0]
    if not norms.any() or ("norm" not in name and norms.min() == norms.max() and bool((weight == first).all())):
        return f"all {weight.numel()} values are {float(first):g}"
    zero = norms == 0
    if zero.float().mean() > ZERO_ROWS or (zero.ndim > 1 and bool(zero.flatten(1).all(dim=1).any())):
        return f"{int(zero.sum())} of {zero.numel()} rows are zero"
    if quantised:
        return None
    row = weight.reshape(-1, weight.shape[-1])[int(norms.argmax())]
    if row.abs().max() > 1 and bool((row == row.round()).all()) and bool((weight == weight.round()).all()):
        return "all values are whole numbers: quantised ones, without their scale"
    rms = float(norms.double().square().mean().sqrt()) / weight.shape[-1] ** 0.5
    if rms > LARGEST_RMS:
        return f"its values are {rms:.3g} large (root mean square), as quantised ones are without their scale"
    return None
