"""What a model is, in digests: results and stored prefixes belong to these weights and this tokenizer, and to no others."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from cedkv.lm.source import LanguageModel


def weights_digest(model: Any) -> str:
    """sha256 over name, shape, dtype and bytes of every weight, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
    return found | {f"versions.{name}": version for name, version in lm.meta["versions"].items()}
