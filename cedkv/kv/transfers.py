"""Copies between host and device: none makes the host wait for a card, but those that bring results back, many in one.

A card computes what it was given while the host prepares what comes next. It falls idle where the host waits for a number, so
what a unit needs on the host is asked for late and together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

K = TypeVar("K")


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; the copy to a card is made from pinned memory, and not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def index_on(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return whole numbers as a tensor on a device, (n,) int64; a list as an index would be waited for."""
    return upload(torch.tensor(values, dtype=torch.long), device)


def download(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors on the host, in one copy for each dtype and one wait for each card."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    found = list(tensors)
    for at, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            groups.setdefault((tensor.device, tensor.dtype), []).append(at)
    copies = {}
    for (device, dtype), members in groups.items():
        flat = torch.cat([tensors[at].reshape(-1) for at in members])
        copies[device, dtype] = flat.to("cpu", non_blocking=device.type == "cuda")  # into pinned memory
    for card in {device for device, _ in copies if device.type == "cuda"}:
        torch.cuda.current_stream(card).synchronize()
    for key, members in groups.items():
        sizes = [tensors[at].numel() for at in members]
        for at, part in zip(members, torch.split(copies[key], sizes), strict=True):
            found[at] = part.reshape(tensors[at].shape)
    return found


def to_lists(tensors: Mapping[K, torch.Tensor]) -> dict[K, list[Any]]:
    """Return tensors as (nested) lists of Python's own numbers, copied as ``download`` does."""
    return {key: tensor.tolist() for key, tensor in zip(tensors, download(list(tensors.values())), strict=True)}
