"""Where a model runs: one device, or spread over several."""

from __future__ import annotations

from typing import Any

import torch

from cedkv.config.schema import RuntimeBlock
from cedkv.core.errors import ConfigError


def pick_device(setting: str) -> torch.device:
    """``auto`` takes cuda, then mps, then cpu.

    Raises:
        ConfigError: a device that is not there.
    """
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(setting)
    there = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
    }
    if not there[device.type]:
        raise ConfigError(
            f"runtime.device = {setting!r} is not there ({torch.cuda.device_count()} CUDA devices seen by torch "
            f"{torch.__version__}); use auto or cpu, or install a torch build for your accelerator"
        )
    return device


def device_map(runtime: RuntimeBlock, device: torch.device, quantised: bool) -> Any:
    """The ``device_map`` to load with; None for a model that is put on its device afterwards.

    Quantised weights are made for where they are loaded: they are never moved or cast later.
    """
    if runtime.device_map is not None:
        return runtime.device_map
    return {"": device} if quantised else None


def to_device(model: Any, device: torch.device, mapped: bool) -> torch.device:
    """Put a model on its device, unless loading did (``mapped``); returns where its inputs go: to its embedding."""
    if not mapped:
        model.to(device)
        return device
    embedding = model.get_input_embeddings()
    execution = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)  # of weights that wait on a disk
    return embedding.weight.device if execution is None else torch.device(execution)
