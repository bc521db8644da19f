"""Matrix products on CPUs: float32 through oneDNN, where the BLAS that torch uses may run at half the processor's speed.

MKL, the BLAS of torch's x86 builds, takes its AVX2 kernels on processors of other makers; oneDNN, which torch also holds and
uses for bfloat16, takes AVX-512 on all of them (seen on a Zen 5: 109 against 250 GFLOP/s a core). Both are float32 to the
same rounding: against a float64 model their logits are equally far away.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_onednn(model: torch.nn.Module) -> bool:
    """Send the model's float32 ``nn.Linear`` layers through oneDNN; returns whether any was.

    Nothing changes where it would not help or cannot be had: other devices and dtypes, processors without AVX-512, layers
    that are quantised or wrapped.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    found = False
    for module in model.modules():
        plain = type(module) is torch.nn.Linear and "forward" not in vars(module)
        if plain and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            module.forward = types.MethodType(_linear, module)
            found = True
    return found


def _linear(self: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")


@contextmanager
def plain(model: torch.nn.Module) -> Iterator[None]:
    """Inside the context ``use_onednn`` is undone."""
    changed = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) is _linear]
    for module in changed:
        del module.forward
    try:
        yield
    finally:
        for module in changed:
            module.forward = types.MethodType(_linear, module)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What ``mallopt`` sets, as glibc names it: free bytes that go back to the system, and the size of blocks mapped apart."""
KEPT, APART = 1 << 30, 1 << 25
"""1 GB of free memory is kept; 32 MB is the largest size glibc takes."""


def keep_freed() -> None:
    """Let this process keep memory that it has freed, where the C library is glibc and the user has not set this himself.

    Every pass makes its K/V cache anew. Given back and taken again page by page, that is a page fault for each 4 KB: in 32
    samples of the quickstart 440,000 of them and a twentieth of the time, against 4,500 when it is kept.
    """
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, APART)
            mallopt(M_TRIM_THRESHOLD, KEPT)
