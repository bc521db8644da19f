"""Keys moved by rotation, against an implementation of its own, and against the models that rotate in each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from cedkv.checks.precision import EPSILON
from cedkv.checks.probe import run_probe
from cedkv.core.errors import ModelError
from cedkv.kv import attention
from cedkv.kv.rope import RopeLayout, rerotate_keys
from cedkv.models.rope_detection import detect_rope_layouts
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.tiny import SMALL

CPU = torch.device("cpu")


def complex_rotation(keys: np.ndarray, shift: float, inv_freq: np.ndarray, layout: str, start: int) -> np.ndarray:
    """Rotary embedding as complex multiplication in float64: pair i is one complex number, turned by shift * inv_freq[i]."""
    out, pairs = keys.copy(), len(inv_freq)
    first = start + (np.arange(pairs) if layout == "halves" else 2 * np.arange(pairs))
    second = first + (pairs if layout == "halves" else 1)
    turned = (keys[..., first] + 1j * keys[..., second]) * np.exp(1j * shift * inv_freq)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


@pytest.mark.parametrize(("pairs", "start"), [(8, 0), (3, 0), (3, 10), (0, 0)])
@pytest.mark.parametrize("layout", ["halves", "neighbours"])
@pytest.mark.parametrize("shift", [-300, -1, 0, 37, 5000])
def test_rotation_is_complex_multiplication(shift: int, layout: Any, pairs: int, start: int) -> None:
    """All of a key, its first and its last dimensions; forwards and (by its negative frequencies) backwards."""
    torch.manual_seed(0)
    keys, inv_freq = torch.randn(2, 3, 5, 16), 1e5 ** -(torch.arange(pairs) / 8)
    for signed in (inv_freq, -inv_freq):
        found = rerotate_keys(keys, torch.full((2, 5), shift), RopeLayout(signed, layout, start))
        expected = complex_rotation(keys.double().numpy(), shift, signed.double().numpy(), layout, start)
        assert np.abs(found.numpy() - expected).max() < 1e-5


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


WAYS = {
    "llama": (LlamaConfig(**SMALL), "halves", [8] * 4),
    "linear": (LlamaConfig(**SMALL, **_rope("linear", factor=4.0)), "halves", [8] * 4),
    "dynamic": (LlamaConfig(**SMALL, **_rope("dynamic", factor=4.0)), "halves", [8] * 4),
    "llama3": (LlamaConfig(**SMALL, **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                            original_max_position_embeddings=32)), "halves", [8] * 4),
    "yarn": (LlamaConfig(**SMALL, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)), "halves", [8] * 4),
    "qwen2": (Qwen2Config(**SMALL), "halves", [8] * 4),
    "qwen3, norm of q and k": (hf.Qwen3Config(**SMALL, head_dim=32), "halves", [16] * 4),
    "gpt_neox, partial": (hf.GPTNeoXConfig(**SMALL), "halves", [2] * 4),
    "cohere, neighbours": (hf.CohereConfig(**SMALL), "neighbours", [8] * 4),
    "glm, neighbours, partial": (hf.GlmConfig(**SMALL, head_dim=16), "neighbours", [4] * 4),
    "nanochat, backwards": (hf.NanoChatConfig(**SMALL), "halves", [8] * 4),
    "smollm3, a layer without positions": (hf.SmolLM3Config(**SMALL), "halves", [8, 8, 8, 0]),
    "gemma3, two frequency bases": (hf.Gemma3TextConfig(**SMALL, head_dim=16), "halves", [8] * 4),
}  # fmt: skip


def raised(hf_config: Any) -> Any:
    """A model with weights large enough for positions to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention.register(), dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize(("hf_config", "layout", "pairs"), WAYS.values(), ids=WAYS.keys())
def test_every_way_is_found_and_moves_keys_to_where_the_model_puts_them(hf_config: Any, layout: str, pairs: list[int]) -> None:
    """Found on some tokens; then other tokens, run 50 positions further on, are moved back by an implementation of its own."""
    model = raised(hf_config)
    found = detect_rope_layouts(model, CPU, 128, 1e-4)
    assert found is not None
    assert [len(turn.inv_freq) for turn in found] == pairs
    assert {turn.layout for turn in found if len(turn.inv_freq)} == {layout}
    ids = torch.tensor([[60, 3, 33, 3, 21]])
    here, there = (
        model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5)[None] + at, use_cache=True).past_key_values
        for at in (0, 50)
    )
    for turn, low, high in zip(found, here.layers, there.layers, strict=True):
        keys = high.keys.detach().double().numpy()
        moved = complex_rotation(keys, -50, turn.inv_freq.double().numpy(), turn.layout, turn.start)
        assert np.abs(moved - low.keys.detach().numpy()).max() < 1e-4 * np.abs(keys).max()


def test_keys_that_follow_no_rotation_are_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions measured: none fits. And a rotary model whose keys fit nothing is rejected for gather + compact."""
    assert detect_rope_layouts(raised(hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64)), CPU, 128, 1e-4) is None
    folder = tiny.save(tmp_path, "llama")
    points.DETECT_ROPE_LAYOUTS.replace(lambda *_: None, monkeypatch)
    with pytest.raises(ModelError, match="did not follow any rotation known here"):
        tiny.load(folder, "prefix.kv_source=gather")
    _, lm = tiny.load(folder)
    assert lm.rope_layouts is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_rounding_does_to_moved_keys_does_not_grow_with_depth(architecture: str, dtype: str, tmp_path: Path) -> None:
    """Tokens that see others get other inputs in deeper layers, by rounding of scores: no fault of a rotation, but once
    taken for one, 0.061 in bfloat16."""
    tiny.save(tmp_path, architecture, num_hidden_layers=12)
    _, lm = tiny.load(tmp_path, f"runtime.torch_dtype={dtype}")
    assert lm.rope_layouts is not None
    assert 0 < run_probe(lm).figures["rotation_equivariance"] <= 6 * EPSILON[dtype]
