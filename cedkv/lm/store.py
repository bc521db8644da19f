"""Prefixes on disk, as safetensors: no pickle is written or read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cedkv.errors import DataError
from cedkv.lm.cache import PrefixBatch


def save_prefix(prefix: PrefixBatch, path: Path) -> None:
    """Write a prefix: ``keys.N``, ``values.N`` a layer, ``visible`` and ``query_start``."""
    tensors = {"visible": prefix.visible, "query_start": prefix.query_start}
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = key, value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_prefix(path: Path, device: torch.device) -> PrefixBatch:
    """Read what ``save_prefix`` wrote.

    Raises:
        DataError: not a safetensors file, or not one of a prefix.
    """
    try:
        tensors = load_file(path, device=str(device))
        layers = range(sum(name.startswith("keys.") for name in tensors))
        return PrefixBatch(
            tuple(tensors[f"keys.{layer}"] for layer in layers),
            tuple(tensors[f"values.{layer}"] for layer in layers),
            tensors["visible"],
            tensors["query_start"],
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} is not a stored prefix: {error}; make it again") from None
