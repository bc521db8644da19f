"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from cedkv.core.version import __version__

NATIVE = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of processors that multiply bfloat16 themselves; others convert, and are slower than in float32."""


def describe() -> dict[str, Any]:
    """Machine, threads and versions, as they stand in ``outputs/bench.json``."""
    return {
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(), "architecture": platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "torch_capability": torch.backends.cpu.get_cpu_capability(), "bfloat16": sorted(NATIVE & flags()),
            "load_before": [round(load, 2) for load in os.getloadavg()],
        },
        "threads": torch.get_num_threads(),
        "versions": {"cedkv": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip


def processor() -> str:
    """The processor's name, where the system tells it."""
    return _info("model name") or platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """What the processor says it can do, by Linux's names; empty where that is not known."""
    return frozenset((_info("flags") or _info("Features")).split())


def _info(name: str) -> str:
    """The first entry of that name in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
