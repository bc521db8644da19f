"""Where a model runs: on one device, or spread over several."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch

from cedkv.config.schema import RuntimeBlock
from cedkv.core.errors import ConfigError

FLOAT64_CARDS = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of NVIDIA's cards that compute float64 at half the speed of float32: P100, V100, A100, H100, H200, B200.

Others do at a 32nd or a 64th (CUDA programming guide, throughput of native arithmetic instructions).
"""
_log = logging.getLogger(__name__)


def pick_device(setting: str, anywhere: bool = False) -> torch.device:
    """Return the device that ``runtime.device`` names; ``auto`` takes cuda, then mps, then cpu, of this machine.

    Args:
        anywhere: whether a named device may be one of another machine.

    Raises:
        ConfigError: no device is named so, or it is not available.
    """
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device = {setting!r} is no device: {str(error).splitlines()[0]}; use auto or cpu") from None
    if str(device) != setting:  # torch holds an index in 8 bits: cuda:256 would be cuda:0
        raise ConfigError(f"runtime.device = {setting!r} is no device: torch takes the index for {device}; use auto or cpu")
    if not anywhere and not is_here(device):
        raise ConfigError(
            f"runtime.device = {setting!r} is not available ({torch.cuda.device_count()} CUDA devices seen by torch "
            f"{torch.__version__}); use auto or cpu, or install a torch build for your accelerator"
        )
    return device


def is_here(device: torch.device) -> bool:
    """Return whether a device is one of this machine."""
    available = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
    }
    return available[device.type]


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a card, after torch has given back what it holds and does not use; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def use_exact_float32(device: torch.device, torch_dtype: str) -> None:
    """Turn off what computes products of float32 matrices in fewer bits (TF32 on cards, bfloat16 on CPUs), for this process.

    The limits of float32 hold for float32's own rounding, so a setting that the process has made before does not count.

    Raises:
        ConfigError: a float32 model, and the environment makes cuBLAS use TF32 whatever a program asks for.
    """
    if device.type == "cuda" and torch_dtype == "float32" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise ConfigError(
            "NVIDIA_TF32_OVERRIDE=1 makes every float32 product of a card one of 10 bits, and the limits of float32 would not "
            "hold; unset it, or set runtime.torch_dtype=bfloat16"
        )
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for one backend and not for another
        before = "other"
    torch.set_float32_matmul_precision("highest")
    if before != "highest":
        _log.warning("torch.set_float32_matmul_precision was %r and is 'highest' now: float32 is computed in float32", before)


@cache
def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of distributions over the vocabulary: float64, or float32 where a device is slow at float64 or has none.

    A run's numerical floor is measured in the same.
    """
    if device.type == "cuda" and torch.version.hip is None:
        return torch.float64 if torch.cuda.get_device_capability(device) in FLOAT64_CARDS else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def device_map(runtime: RuntimeBlock, device: torch.device, quantised: bool) -> Any:
    """Return the ``device_map`` to load with; None for a model that is moved to its device after loading.

    Quantised weights are packed for the device they are loaded on, so they are never moved or cast later.
    """
    if runtime.device_map is not None:
        return runtime.device_map
    return {"": device} if quantised else None


def to_device(model: Any, device: torch.device, mapped: bool) -> torch.device:
    """Move a model to its device unless loading placed it (``mapped``); return the device of its inputs, its embedding's."""
    if not mapped:
        model.to(device)
        return device
    embedding = model.get_input_embeddings()
    execution_device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)  # set for offloaded weights
    return embedding.weight.device if execution_device is None else torch.device(execution_device)
