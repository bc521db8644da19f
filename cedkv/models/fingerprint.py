"""What a model is, in digests: results and stored prefixes belong to these weights and this tokenizer, and to no others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device

from cedkv.models.loading import LanguageModel

_weights: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
"""Digests of loaded models: reading all weights once is enough (0.4 s for 135M parameters in float32)."""


def tensors_digest(
    tensors: Iterable[tuple[str, torch.Tensor]], *more: bytes, read: Callable[[str], torch.Tensor] | None = None
) -> str:
    """sha256 over name, shape, dtype and bytes of every tensor, in the order of names, and then over ``more``.

    ``read`` gives, by name, a tensor that waits on a disk.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.is_meta and read is not None:
            tensor = read(name)
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for part in more:
        digest.update(part)
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over every weight of a model, computed when it is first asked for."""
    if model not in _weights:
        _weights[model] = tensors_digest(model.state_dict().items(), read=partial(_offloaded, model))
    return _weights[model]


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate keeps elsewhere until its layer runs."""
    place, _, leaf = name.rpartition(".")
    module = model.get_submodule(place)
    with align_module_device(module, torch.device("cpu")):
        found: torch.Tensor = getattr(module, leaf).detach().clone()
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over the whole fast tokenizer (vocabulary, merges, normaliser, special tokens) and its chat template."""
    text = f"{tokenizer.backend_tokenizer.to_str()}\n{tokenizer.chat_template!r}\n{tokenizer.bos_token_id}"
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(lm: LanguageModel) -> dict[str, Any]:
    """The model, the tokenizer, and what computes with them, flat."""
    found = {
        "model.commit": lm.meta["model_commit"],
        "model.weights": weights_digest(lm.model),
        "model.tokenizer": tokenizer_digest(lm.tokenizer),
    }
    found |= {f"runtime.{name}": lm.meta[name] for name in ("torch_dtype", "device", "device_name", "torch_threads")}
    if lm.meta["trust_remote_code"]:
        found["model.code"] = lm.meta["trust_remote_code"]
    return found | {f"versions.{name}": version for name, version in lm.meta["versions"].items()}


def prefix_fingerprint(lm: LanguageModel) -> dict[str, Any]:
    """What a stored prefix belongs to: the fingerprint and the model's name, without what only carries out the computation."""
    named = {f"model.{name}": lm.meta[f"model_{name}"] for name in ("id", "revision")}
    there = {"runtime.device", "runtime.device_name", "runtime.torch_threads", "versions.python"}
    return named | {name: value for name, value in fingerprint(lm).items() if name not in there}
