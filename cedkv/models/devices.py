"""Where a model runs: on one device, or spread over several."""

from __future__ import annotations

from typing import Any

import torch

from cedkv.config.schema import RuntimeBlock
from cedkv.core.errors import ConfigError


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
    except RuntimeError as error:  # an index that torch cannot hold
        raise ConfigError(f"runtime.device = {setting!r} is no device: {str(error).splitlines()[0]}; use auto or cpu") from None
    available = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
    }
    if not anywhere and not available[device.type]:
        raise ConfigError(
            f"runtime.device = {setting!r} is not available ({torch.cuda.device_count()} CUDA devices seen by torch "
            f"{torch.__version__}); use auto or cpu, or install a torch build for your accelerator"
        )
    return device


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
