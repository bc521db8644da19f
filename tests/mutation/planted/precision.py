"""Faults that lose digits, in the model, the prefix or its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cedkv.kv.cache import KVPrefix
from tests.mutation.planted import Patch, Plant
from tests.support import patch_points as points


def loaded(patch: Patch, change: Callable[[Any], None]) -> None:
    """Change the model right after it was loaded."""

    def changed(real: Any, config: Any) -> Any:
        lm = real(config)
        change(lm)
        return lm

    points.LOAD_MODEL.wrap(patch, changed)


def bfloat16_passed_off_as_float32(patch: Patch) -> None:
    loaded(patch, lambda lm: lm.model.to(torch.bfloat16))


def products_in(dtype: torch.dtype) -> Plant:
    """Inputs of every linear layer are rounded, what comes out is float32."""

    def change(lm: Any) -> None:
        for layer in lm.model.modules():
            if type(layer) is torch.nn.Linear:
                real = layer.forward
                layer.forward = lambda rows, _real=real: _real(rows.to(dtype).to(rows.dtype))

    def plant(patch: Patch) -> None:
        loaded(patch, change)

    plant.__name__ = f"products_in_{str(dtype)[6:]}"
    return plant


def prefix_kept_in(dtype: torch.dtype) -> Plant:
    def plant(patch: Patch) -> None:
        def narrow(tensors: Any) -> Any:
            return tuple(tensor.to(dtype).to(tensor.dtype) for tensor in tensors)

        points.ASSEMBLE_GATHERED.wrap(patch, lambda real, keys, values, placed: real(narrow(keys), narrow(values), placed))

    plant.__name__ = f"prefix_kept_in_{str(dtype)[6:]}"
    return plant


def stored_in(dtype: torch.dtype) -> Plant:
    def plant(patch: Patch) -> None:
        def narrow(real: Any, prefix: KVPrefix, *rest: Any) -> Any:
            return real(replace(prefix, keys=tuple(k.to(dtype).to(k.dtype) for k in prefix.keys)), *rest)

        points.SAVE_PREFIX.wrap(patch, narrow)

    plant.__name__ = f"stored_in_{str(dtype)[6:]}"
    return plant


def stored_layers_swapped(patch: Patch) -> None:
    points.SAVE_PREFIX.wrap(patch, lambda real, prefix, *rest: real(replace(prefix, keys=prefix.keys[::-1]), *rest))
