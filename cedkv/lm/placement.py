"""Where a model runs: the device it is put on."""

from __future__ import annotations

import torch

from cedkv.errors import ConfigError


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
