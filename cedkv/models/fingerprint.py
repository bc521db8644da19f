"""Digests that identify a model: results and stored prefixes are valid for exactly these weights and this tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device

from cedkv.core.source import RECORDS_CODE, code_digest
from cedkv.core.threads import usable_cpus
from cedkv.models.loading import LanguageModel

DEVICE_KIND = ("runtime.device", "runtime.device_name")
"""The values of a fingerprint that say what kind of device computes."""
_weights_digests: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
"""Digests of loaded models, kept because a core reads 1.4 GB of weights a second."""


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]], *suffixes: bytes) -> str:
    """Return the sha256 over name, shape, dtype and bytes of every tensor, in order of names, then over ``suffixes``.

    Args:
        tensors: (name, tensor) pairs, of any shape.
        suffixes: bytes hashed after the tensors.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for suffix in suffixes:
        digest.update(suffix)
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """Return the sha256 over the digests of every weight of a model; computed on the first call, by all CPUs."""
    if model not in _weights_digests:
        weights = sorted(model.state_dict().items())
        offloaded = any(weight.is_meta for _, weight in weights)  # a module is brought in for one weight after the other
        with ThreadPoolExecutor(1 if offloaded else usable_cpus()) as pool:
            digests = pool.map(partial(_weight_digest, model), *zip(*weights, strict=True))
        _weights_digests[model] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return _weights_digests[model]


def _weight_digest(model: torch.nn.Module, name: str, weight: torch.Tensor) -> str:
    return tensors_digest([(name, read_weight(model, name) if weight.is_meta else weight)])


def read_weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a weight that accelerate keeps in memory or on disk until its layer runs."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    with align_module_device(module, torch.device("cpu")):
        weight: torch.Tensor = getattr(module, parameter_name).detach().clone()
    return weight


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 over the fast tokenizer (vocabulary, merges, normaliser, special tokens) and its chat template."""
    text = f"{tokenizer.backend_tokenizer.to_str()}\n{tokenizer.chat_template!r}\n{tokenizer.bos_token_id}"
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(lm: LanguageModel) -> dict[str, Any]:
    """Return what identifies the model, the tokenizer and the software and device that compute, under flat keys."""
    values = {
        **_file(lm),
        "model.commit": lm.meta["model_commit"],
        "model.weights": weights_digest(lm.model),
        "model.tokenizer": tokenizer_digest(lm.tokenizer),
    }
    values |= {f"runtime.{name}": lm.meta[name] for name in ("torch_dtype", "device_name", "torch_threads")}
    values["runtime.device"] = lm.device.type  # not its index: cards of one name compute the same
    if lm.meta["trust_remote_code"]:
        values["model.code"] = lm.meta["trust_remote_code"]
    values["versions.code"] = code_digest(RECORDS_CODE)
    return values | {f"versions.{name}": version for name, version in lm.meta["versions"].items()}


def model_names(lm: LanguageModel) -> dict[str, Any]:
    """Return what a model is called: hub id or folder with its revision; for a GGUF file its digest, wherever it lies."""
    return _file(lm) or {f"model.{name}": lm.meta[f"model_{name}"] for name in ("id", "revision")}


def _file(lm: LanguageModel) -> dict[str, Any]:
    return {} if lm.meta["gguf"] is None else {"model.gguf": lm.meta["gguf"]["sha256"]}


def prefix_fingerprint(lm: LanguageModel) -> dict[str, Any]:
    """Return what a stored prefix is valid for: the fingerprint and the model's name, without device, threads and code."""
    names = model_names(lm)
    execution_only = {"runtime.device", "runtime.device_name", "runtime.torch_threads", "versions.python", "versions.code"}
    return names | {name: value for name, value in fingerprint(lm).items() if name not in execution_only}
