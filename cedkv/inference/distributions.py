"""Distributions over the vocabulary, as log-probabilities: from logits, compared, restricted, and checked to be numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cedkv.core.errors import NumericsError


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities over the last dimension (the vocabulary), in float64 (float32 on mps).

    Logits are cast to float32 first, whatever the model's dtype.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits.to(torch.float32).to(dtype).log_softmax(dim=-1)


def kl(student: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(student || reference) = sum_v p_student(v) (log p_student(v) - log p_reference(v)).

    Args:
        student, reference: log-probabilities, (B, vocabulary), or of the same labels, (B, labels).

    Returns:
        (B,) in nats; values that rounding puts below 0 become 0.
    """
    return (student.exp() * (student - reference)).sum(dim=-1).clamp_min(0)


def among_labels(logprobs: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities restricted to some tokens and renormalised: log p(v) - log sum_w p(w), w over the labels.

    Args:
        logprobs: (..., vocabulary).
        labels: token ids.

    Returns:
        (..., labels) in the order of ``labels``.
    """
    return logprobs[..., list(labels)].log_softmax(dim=-1)


def require_finite(values: torch.Tensor, quantity: str, names: Sequence[str]) -> None:
    """Raise if a value is not finite.

    Args:
        values: (B, ...).
        quantity: what the values are, for the error.
        names: B sample ids, for the error.

    Raises:
        NumericsError: some rows are not finite; names the first.
    """
    if values.sum(dtype=torch.float32).isfinite():  # implies that every term is finite; much faster than checking each
        return
    bad = [names[row] for row in (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()]
    if bad:
        raise NumericsError(
            f"{quantity} of {len(bad)} of {len(names)} samples are not finite (first: {bad[0]}); nothing can be decided from "
            "them. Try runtime.torch_dtype=float32; if the error remains, the weights or the sample are damaged"
        )
