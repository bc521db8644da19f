"""Distributions over the vocabulary, as log-probabilities: from logits, compared, restricted, and checked to be numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

import torch

from cedkv.core.errors import NumericsError
from cedkv.kv.transfers import download, index_on
from cedkv.models.devices import sum_dtype


class _Unchecked(NamedTuple):
    """Values of a device that were not looked at yet: the smallest and the largest of each row; a NaN is both."""

    smallest: torch.Tensor
    largest: torch.Tensor
    quantity: str
    names: Sequence[str]


_unchecked: ContextVar[list[_Unchecked] | None] = ContextVar("cedkv_unchecked", default=None)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities over the last dimension (the vocabulary), in ``sum_dtype``.

    Logits are cast to float32 first, whatever the model's dtype.
    """
    return logits.to(torch.float32).to(sum_dtype(logits.device)).log_softmax(dim=-1)


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
    return logprobs[..., index_on(labels, logprobs.device)].log_softmax(dim=-1)


@contextmanager
def finite_by_the_end() -> Iterator[None]:
    """Let ``require_finite`` look at the values of a card when the context ends, at all of them together.

    Raises:
        NumericsError: as ``require_finite``, for the first values that are not finite. Where the context ends in an error and
            values are not finite, that is what it comes from, and is raised in its place.
    """
    waiting: list[_Unchecked] = []
    token = _unchecked.set(waiting)
    try:
        yield
    except Exception as error:
        with suppress(RuntimeError):  # a card that has failed gives nothing back
            _require_all_finite(waiting, error)
        raise
    else:
        _require_all_finite(waiting, None)
    finally:
        _unchecked.reset(token)


def _require_all_finite(waiting: Sequence[_Unchecked], cause: Exception | None) -> None:
    ends = download([end for values in waiting for end in (values.smallest, values.largest)])
    for values, smallest, largest in zip(waiting, ends[::2], ends[1::2], strict=True):
        _reject(~(smallest.isfinite() & largest.isfinite()), values.quantity, values.names, cause)


def require_finite(values: torch.Tensor, quantity: str, names: Sequence[str]) -> None:
    """Raise if a value is not finite; of values on a card inside ``finite_by_the_end``, when that ends.

    Args:
        values: (B, ...), of two dimensions at least.
        quantity: what the values are, for the error.
        names: B sample ids, for the error.

    Raises:
        NumericsError: some rows are not finite; names the first.
    """
    waiting = _unchecked.get()
    if waiting is not None and values.device.type != "cpu":
        if values.numel():
            rest = tuple(range(1, values.dim()))
            waiting.append(_Unchecked(values.amin(dim=rest), values.amax(dim=rest), quantity, names))
        return
    if values.sum(dtype=torch.float32).isfinite():  # implies that every term is finite; much faster than checking each
        return
    _reject(~values.isfinite().flatten(1).all(dim=1), quantity, names, None)


def _reject(rows: torch.Tensor, quantity: str, names: Sequence[str], cause: Exception | None) -> None:
    """Raise NumericsError if there is a row, (B,) bool, whose values are not finite."""
    bad = [name for name, wrong in zip(names, rows.tolist(), strict=True) if wrong]
    if bad:
        raise NumericsError(
            f"{quantity} of {len(bad)} of {len(names)} samples are not finite (first: {bad[0]}); nothing can be decided from "
            "them. Try runtime.torch_dtype=float32; if the error remains, the weights or the sample are damaged"
        ) from cause
