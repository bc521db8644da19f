"""A stand-in for a card, where there is none: tensors that say they are on ``cuda:0``, and hold their numbers on the CPU.

It is as strict as a card: an operation on tensors of both devices is the error that it is there, and so is a tensor of the
card that is taken for an array. And it counts what makes the host wait for the device (``torch.cuda.set_sync_debug_mode`` tells
it on a real one): a number that is read, a copy in either direction that is not asynchronous, an index that is a list or a
mask. What it cannot show is a card's own arithmetic, memory and speed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cedkv.inference import prefix_store

CARD = torch.device("cuda", 0)
NAME = "stand-in for a card"
PACKAGE = Path(__file__).parents[2] / "cedkv"
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
"""Operations whose result the host waits for."""
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default}
"""Operations whose result has a size that depends on values, for which the host waits."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
TAKES_BOTH = INDEXED | {aten.copy_.default}
"""Operations that take tensors of both devices."""

Waits = Counter[tuple[str, str]]
"""(line of the package, or library that it calls; what is waited for) -> how often."""
_waits: list[Waits] = []


class CardTensor(torch.Tensor):
    """A tensor on the stand-in."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CardTensor:
        with torch.inference_mode(False):  # an inference tensor could not be looked at outside of inference
            return torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="cpu"
            )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"CardTensor({self.held!r})"

    def cpu(self, *_: Any) -> torch.Tensor:
        return _fetched(self)

    def cuda(self, *_: Any) -> CardTensor:
        return self

    def tolist(self) -> Any:
        return _fetched(self).tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() to copy it to host memory first")

    __array__ = numpy

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, wait = _target(args, kwargs)
        here = self if dtype is None else torch.Tensor.to(self, dtype)
        return here if device is None or device.type == "cuda" else _fetched(here, wait)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return _compute(func, args, kwargs or {})


def _fetched(tensor: CardTensor, wait: bool = True) -> torch.Tensor:
    if wait:
        _wait("copy to the host")
    return tensor.held.clone()


def _target(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.device | None, torch.dtype | None, bool]:
    """Device, dtype and whether the host waits, of the arguments of ``Tensor.to``."""
    given = [*args, kwargs.get("device"), kwargs.get("dtype")]
    flags = [value for value in args if isinstance(value, bool)]
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    devices = [torch.device(value) for value in given if isinstance(value, str | torch.device)] + [t.device for t in tensors]
    dtypes = [value for value in given if isinstance(value, torch.dtype)] + [tensor.dtype for tensor in tensors]
    wait = not kwargs.get("non_blocking", flags[0] if flags else False)
    return devices[0] if devices else None, dtypes[0] if dtypes else None, wait


def _compute(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operation as a card does it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, CardTensor) and tensor.dim() > 0]
    if on_card and on_host:
        if func not in TAKES_BOTH or (func in INDEXED and not isinstance(args[0], CardTensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of cuda:0 and cpu")
        _wait("an index of the host" if func in INDEXED else "copy")
    if func in READS:
        _wait("a number is read")
    if func in SIZED_BY_VALUES or (func in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])):
        _wait("a size that depends on values")
    held = {id(tensor.held): tensor for tensor in on_card}

    def put(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return held[id(value)] if id(value) in held else CardTensor(value)

    if func is aten.histc.default and not args[0].dtype.is_floating_point:  # which a CPU does not count
        return _compute(func, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)
    found = func(*tree_map(_held, args), **tree_map(_held, dict(kwargs)))
    into_host = func is aten.copy_.default and not isinstance(args[0], CardTensor)
    return args[0] if into_host else tree_map(put, found)


def _held(value: Any) -> Any:
    if isinstance(value, CardTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class _OnCard(TorchFunctionMode):
    """Calls that name the card as their device put their result there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and not isinstance(args[0], CardTensor):
            device, dtype, wait = _target(args[1:], kwargs)
            if device is None or device.type != "cuda":
                return func(*args, **kwargs)
            if wait and args[0].numel():
                _wait("copy to the card")
            held = args[0].detach().clone()
            return CardTensor(held if dtype is None else held.to(dtype))
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda" or func is torch.Tensor.to:
            return func(*args, **kwargs)
        found = func(*args, **{**kwargs, "device": "cpu"})
        if func is torch.tensor and found.numel():
            _wait("copy to the card")
        return CardTensor(found) if isinstance(found, torch.Tensor) and not isinstance(found, CardTensor) else found


def _wait(what: str) -> None:
    """Count a wait under the innermost line of the package, or the library's file that this line has called."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            where = f"{path.relative_to(PACKAGE).as_posix()}:{frame.f_lineno}"
            break
        library = library or (path.name if "transformers" in path.parts else "")
        frame = frame.f_back  # type: ignore[assignment]
    else:
        return
    for waits in _waits:
        waits[f"transformers {library}" if library else where, what] += 1


@contextmanager
def counting_waits() -> Iterator[Waits]:
    """Count what makes the host wait inside the context."""
    waits: Waits = Counter()
    _waits.append(waits)
    try:
        yield waits
    finally:
        _waits.remove(waits)


@contextmanager
def stand_in(free: int = 1 << 36) -> Iterator[None]:
    """Let torch believe, inside the context, that there is one card, with so many bytes free."""
    believed: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": lambda *_: SimpleNamespace(synchronize=lambda: _wait("results are fetched")),
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (free, 1 << 36),
        "empty_cache": lambda: None,
        "is_bf16_supported": lambda *_: True,
    }
    save = prefix_store.save_file  # safetensors reads memory itself

    def save_file(tensors: Mapping[str, torch.Tensor], *rest: Any) -> None:
        save({name: tensor.cpu() for name, tensor in tensors.items()}, *rest)

    with ExitStack() as stack:
        for name, answer in believed.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(prefix_store, "save_file", save_file))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(_OnCard())
        yield
