"""Matrix products on CPUs: float32 through oneDNN, where the BLAS that torch uses may run at half the processor's speed.

MKL, the BLAS of torch's x86 builds, takes its AVX2 kernels on processors of other makers; oneDNN, which torch also holds and
uses for bfloat16, takes AVX-512 on all of them (seen on a Zen 5: 109 against 250 GFLOP/s a core). Both are float32 to the
same rounding: against a float64 model their logits are equally far away.
"""

from __future__ import annotations

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
