"""Weights that are no weights are found by their names; what training and initialisation leave behind is none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.checks import certificate
from cedkv.checks.certificate import certify
from cedkv.core.errors import ModelError
from cedkv.models.fingerprint import fingerprint
from cedkv.models.weight_scan import weight_faults
from tests.support import tiny

UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(certificate.FOLDER, str(tmp_path / "certificates"))


def changed(architecture: str, name: str, change: Callable[[torch.Tensor], Any], **settings: Any) -> Any:
    """A model with one changed weight."""
    model = tiny.model(architecture, **settings)
    with torch.no_grad():
        change(model.get_parameter(name))
    return model


FAULTS: dict[str, tuple[str, Callable[[torch.Tensor], Any], str]] = {
    "all zero": (UP, lambda w: w.zero_(), "all 8192 values are 0"),
    "all the same": (UP, lambda w: w.fill_(0.5), "all 8192 values are 0.5"),
    "the end is missing": (UP, lambda w: w[64:].zero_(), "64 of 128 rows are zero"),
    "half of the embedding": (EMBEDDING, lambda w: w[250:].zero_(), "251 of 500 rows are zero"),
    "a row of NaN": (EMBEDDING, lambda w: w[7].fill_(torch.nan), "64 of 32000 values are not finite"),
    "one infinite value": ("model.norm.weight", lambda w: w[3].fill_(torch.inf), "1 of 64 values are not finite"),
    "int8 without a scale": (UP, lambda w: w.copy_((w / w.abs().max() * 127).round()), "whole numbers"),
    "float8 without a scale": (UP, lambda w: w.copy_(w / w.abs().max() * 448), "large (root mean square)"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "change", "match"), FAULTS.values(), ids=FAULTS)
def test_fault_is_named(name: str, change: Callable[[torch.Tensor], Any], match: str, dtype: torch.dtype) -> None:
    (fault,) = weight_faults(changed("llama", name, change).to(dtype), tokens=500)
    assert fault.startswith(f"{name}: ")
    assert match in fault


SOUND: dict[str, tuple[str, str, Callable[[torch.Tensor], Any]]] = {
    "as it is": ("llama", UP, lambda _: None),
    "biases and norms as they are drawn": ("gpt2", "transformer.h.0.attn.c_attn.bias", lambda w: w.zero_()),
    "a row of the padding token": ("llama", EMBEDDING, lambda w: w[1].zero_()),
    "rows of the vocabulary without a token": ("llama", EMBEDDING, lambda w: w[400:].zero_()),
    "a key bias with large values": ("qwen2", "model.layers.0.self_attn.k_proj.bias", lambda w: w.normal_().mul_(2000)),
    "a tenfold projection": ("llama", "model.layers.0.self_attn.q_proj.weight", lambda w: w.mul_(10)),
    "half of the values pruned": ("llama", UP, lambda w: w.mul_(torch.rand_like(w) < 0.5)),
    "ternary values": ("llama", UP, lambda w: w.sign_()),
}


@pytest.mark.parametrize(("architecture", "name", "change"), SOUND.values(), ids=SOUND)
def test_what_is_no_fault(architecture: str, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    assert weight_faults(changed(architecture, name, change), tokens=400) == []


def test_freshly_initialised_and_tied() -> None:
    model = tiny.model("llama", initializer_range=0.02, tie_word_embeddings=True)
    assert weight_faults(model, tokens=500) == []


def test_the_certificate_fails_and_names_the_weight(tmp_path: Path) -> None:
    """A NaN that no probe touches, and a layer of zeros: both sides of every other check compute alike."""
    folder = tmp_path / "model"
    model = changed("llama", UP, lambda w: w.zero_())
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config, lm = tiny.load(folder)
    found = certify(lm, fingerprint(lm), None)
    assert found.failed([config]) == ["weights_are_weights"]
    with pytest.raises(ModelError, match=f"(?s)not certified: weights_are_weights.*{UP}: all 8192 values are 0"):
        found.check([config])
    assert found.as_dict()["model"]["weight_faults"] == [f"{UP}: all 8192 values are 0"]


def test_a_model_that_nothing_moves_cannot_be_certified(tmp_path: Path) -> None:
    """Attention writes nothing: a query at a wrong position, or without a token in front, answers the same."""
    folder = tmp_path / "model"
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-9)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config, lm = tiny.load(folder)
    found = certify(lm, fingerprint(lm), None)
    assert found.model["weight_faults"] == []
    assert all(finding.verdict == "pass" for finding in found.findings)
    (reason,) = found.failed([config])
    assert reason.startswith("cannot be decided: a planted fault moves the output by ")
    assert not found.as_dict()["certified"]
    stored = certificate.ensure_certificate(lm, fingerprint(lm), None)
    assert stored.failed([config]) == [reason], "also when it is read again"
