"""Speed on CPUs: float32 matrix products through oneDNN, and freed memory that is kept.

The BLAS that torch uses may run at half the processor's speed: MKL, the BLAS of torch's x86 builds, takes its AVX2 kernels on
processors of other makers. oneDNN, which torch also contains and uses for bfloat16, takes AVX-512 on all of them (measured on
a Zen 5: 109 against 250 GFLOP/s per core). Both are float32 with the same rounding: their logits are equally far from those of
a float64 model.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def processor() -> str:
    """Return the processor's kind and the instructions that torch uses on it, on which roundings depend: ``x86_64 AVX512``."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def use_onednn(model: torch.nn.Module) -> bool:
    """Route the model's float32 ``nn.Linear`` layers through oneDNN; return whether any layer changed.

    Nothing changes where oneDNN would not help or is unavailable: other devices and dtypes, processors without AVX-512,
    quantised or wrapped layers.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    changed = False
    for module in model.modules():
        unmodified_linear = type(module) is torch.nn.Linear and "forward" not in vars(module)
        if unmodified_linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            module.forward = types.MethodType(_onednn_linear, module)
            changed = True
    return changed


def _onednn_linear(self: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")


@contextmanager
def torch_linear(model: torch.nn.Module) -> Iterator[None]:
    """Use torch's own matrix products inside the context: ``use_onednn`` is undone."""
    changed = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) is _onednn_linear]
    for module in changed:
        del module.forward
    try:
        yield
    finally:
        for module in changed:
            module.forward = types.MethodType(_onednn_linear, module)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``: free bytes beyond which memory returns to the system, and the size from which a block is
mapped separately."""
TRIM_BYTES, MMAP_BYTES = 1 << 30, 1 << 25
"""Keep 1 GB of free memory; 32 MB is the largest mapping threshold that glibc accepts."""


def keep_freed_memory() -> None:
    """Keep memory that this process has freed, if the C library is glibc and the user has not set the threshold.

    Every pass allocates its KV cache anew. If the memory is returned and requested again, every 4 KB page costs a page fault:
    440,000 of them in 32 samples of the quickstart, a twentieth of the time, against 4,500 when the memory is kept.
    """
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
            mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
