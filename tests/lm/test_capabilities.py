"""What a model can do, from its configuration alone: refused by name before weights are loaded, or able indeed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from cedkv.errors import ConfigError, ModelError
from cedkv.lm import attention
from cedkv.lm.batching import Batching
from cedkv.lm.cache import rotate_keys
from cedkv.lm.capabilities import can_rotate, read_capabilities, require, scope_layers
from cedkv.lm.scoring import prefill
from tests import tiny

SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 128}  # fmt: skip
REFUSED = [
    (hf.GPT2Config(), "gpt2", "not one rotary embedding"),
    (hf.OPTConfig(), "opt", "not one rotary embedding"),
    (hf.BloomConfig(), "bloom", "not one rotary embedding"),
    (hf.FalconConfig(alibi=True), "falcon", "not one rotary embedding"),
    (hf.Gemma3TextConfig(), "gemma3_text", "not one rotary embedding"),
    (hf.T5Config(), "t5", "encoder-decoder"),
    (hf.MambaConfig(), "mamba", "names no attention layers"),
    (hf.LlavaConfig(), "llava", "names no attention layers"),
    (hf.DeepseekV3Config(), "deepseek_v3", "latent vectors"),
    (MistralConfig(sliding_window=4096, max_position_embeddings=32768), "mistral", "see a window"),
    (hf.Gemma2Config(), "gemma2", "see a window"),
    (hf.Qwen3NextConfig(), "qwen3_next", "keep no keys"),
    (
        Qwen2Config(use_sliding_window=True, sliding_window=256, max_window_layers=2, num_hidden_layers=4),
        "qwen2",
        "see a window",
    ),
]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(("hf_config", "kind", "reason"), REFUSED, ids=[kind for _, kind, _ in REFUSED])
def test_refused_by_name_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_config: PreTrainedConfig, kind: str, reason: str
) -> None:
    """Neither weights nor tokenizer are there to be loaded; the message says why, and what would work."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    hf_config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"model type '{kind}' is refused: .*{reason}.*; use a decoder with rotary"):
        tiny.load(tmp_path)


@pytest.mark.parametrize(
    "hf_config",
    [MistralConfig(sliding_window=None), MistralConfig(sliding_window=4096, max_position_embeddings=4096),
     Qwen2Config(use_sliding_window=False, sliding_window=256)],
)  # fmt: skip
def test_a_window_that_is_off_or_never_closes_is_no_window(hf_config: PreTrainedConfig) -> None:
    assert read_capabilities(hf_config).n_layers == hf_config.num_hidden_layers


@pytest.mark.parametrize(
    "hf_config",
    [
        LlamaConfig(rope_parameters=DYNAMIC),
        hf.GPTNeoXConfig(),
        hf.CohereConfig(),
        hf.GlmConfig(),
        hf.SmolLM3Config(),
        hf.NanoChatConfig(),
    ],
    ids=["dynamic", "partial", "interleaved", "glm", "layers without positions", "backwards"],
)
def test_gather_at_compact_positions_needs_keys_that_can_be_moved(tmp_path: Path, hf_config: PreTrainedConfig) -> None:
    """Only this one combination moves keys; all others stay open to these models."""
    hf_config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"not possible for model type '{hf_config.model_type}'.*kv_source=prefill or"):
        tiny.load(tmp_path, "prefix.kv_source=gather")
    found = read_capabilities(hf_config)
    for others in (["prefix.kv_source=gather", "injection.positioning_mode=absolute"], ["prefix.kv_source=prefill"]):
        require(found, tiny.config(tmp_path, *others))


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        (LlamaConfig(**SMALL), True),
        (LlamaConfig(**SMALL, **_rope("linear", factor=4.0)), True),
        (LlamaConfig(**SMALL, **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                      original_max_position_embeddings=32)), True),
        (LlamaConfig(**SMALL, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)), True),
        (Qwen2Config(**SMALL), True),
        (hf.Qwen3Config(**SMALL, head_dim=32), True),
        (MistralConfig(**SMALL, sliding_window=None), True),
        (hf.CohereConfig(**SMALL), False),
        (hf.GlmConfig(**SMALL, head_dim=16), False),
        (hf.SmolLM3Config(**SMALL), False),
        (hf.NanoChatConfig(**SMALL), False),
    ],
    ids=["llama", "linear", "llama3", "yarn", "qwen2", "qwen3", "mistral", "cohere", "glm", "smollm3", "nanochat"],
)  # fmt: skip
def test_keys_can_be_moved_where_it_is_said_they_can(hf_config: Any, expected: bool) -> None:
    """The claim, made from the configuration, against the model itself: run 37 positions further on, or rotated there."""
    torch.manual_seed(0)
    name = attention.register()
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=name, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    cpu = torch.device("cpu")
    lm: Any = SimpleNamespace(model=model, device=cpu, batching=Batching(None, cpu))
    here, _ = prefill(lm, [[5, 6, 7, 8, 9]], [range(5)], ["a"])
    there, _ = prefill(lm, [[5, 6, 7, 8, 9]], [range(37, 42)], ["a"])
    inv_freq = model.base_model.rotary_emb.inv_freq
    if 2 * len(inv_freq) == here[0].shape[-1]:  # else only a part of each key is rotated
        moved = [rotate_keys(key, torch.full((1, 5), 37), inv_freq) for key in here]
        errors = [float((m - t).abs().max() / t.abs().max()) for m, t in zip(moved, there, strict=True)]
        assert max(errors) < 1e-4 if expected else max(errors) > 1e-2
    assert can_rotate(read_capabilities(hf_config)) is expected


@pytest.mark.parametrize(
    ("scope", "n_layers", "expected"),
    [
        ("top25", 30, range(22, 30)),  # ceil(7.5) = 8
        ("top25", 4, [3]),
        ("top1", 30, [29]),
        ("top10", 30, range(27, 30)),
        ("top70", 10, range(3, 10)),
        ("top7", 100, range(93, 100)),  # 0.07 x 100 is a little more than 7
        ("top99", 3, range(3)),
        ("top100", 30, range(30)),
        ("all", 30, range(30)),
        ([0, 5, 5, 29], 30, [0, 5, 29]),
    ],
)
def test_layers_of_a_scope(scope: str | list[int], n_layers: int, expected: Any) -> None:
    assert scope_layers(scope, n_layers, "layer_scope.selection") == frozenset(expected)


@pytest.mark.parametrize("key", ["layer_scope.selection", "layer_scope.injection"])
def test_a_layer_beyond_the_last_is_named_with_its_key(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} names layer 30, the model's last is 29; remove it"):
        scope_layers([1, 30], 30, key)
    with pytest.raises(ConfigError, match=f"{key} names layer 4"):
        require(read_capabilities(LlamaConfig(**SMALL)), tiny.config("x", f"{key}=[0,4]"))
