"""What a model can do, from its configuration alone: rejected by name before weights are loaded, or able indeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from cedkv.core.errors import ConfigError, DataError, ModelError
from cedkv.models.capabilities import check_supported, read_capabilities, scope_layers
from tests.support import tiny
from tests.support.runs import run_phase2
from tests.support.tiny import SMALL

REJECTED = [
    (hf.BloomConfig(), "bloom", "positions .* ALiBi"),
    (hf.BloomConfig(), "bloom", "attention is computed inside the model"),
    (hf.FalconConfig(alibi=True), "falcon", "positions .* ALiBi"),
    (hf.FalconConfig(), "falcon", "attention is computed inside the model"),
    (hf.GPTJConfig(), "gptj", "neither rotary"),
    (hf.BertConfig(), "bert", "neither rotary"),
    (hf.Gemma2Config(use_bidirectional_attention=True), "gemma2", "tokens see later ones"),
    (hf.T5Config(), "t5", "encoder-decoder"),
    (hf.MambaConfig(), "mamba", "names no attention layers"),
    (hf.LlavaConfig(), "llava", "a wrapper of several models"),
    (hf.Gemma3Config(), "gemma3", "a wrapper of several models"),
    (hf.DeepseekV3Config(), "deepseek_v3", "latent vectors"),
    (hf.Qwen3NextConfig(), "qwen3_next", r"36 of 48 layers keep something else than keys and values \(36 x linear_attention\)"),
    (LlamaConfig(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "llama", "rope type 'spiral' is not known here"),
    (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "llama", "no frequency base"),
]


@pytest.mark.parametrize(("hf_config", "kind", "reason"), REJECTED, ids=[f"{kind}-{why[:12]}" for _, kind, why in REJECTED])
def test_rejected_by_name_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_config: PreTrainedConfig, kind: str, reason: str
) -> None:
    """Neither weights nor tokenizer are there to be loaded; the message says why, and what would work."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    hf_config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"(?s)model type '{kind}' is rejected before .*{reason}.*\nuse a decoder with rotary"):
        tiny.load(tmp_path)


@pytest.mark.parametrize(
    ("hf_config", "reach"),
    [
        (MistralConfig(sliding_window=None), None),
        (MistralConfig(sliding_window=4096), 4095),
        (Qwen2Config(use_sliding_window=False, sliding_window=256), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=256, max_window_layers=2, num_hidden_layers=4), 255),
        (hf.Gemma3TextConfig(sliding_window=512), 511),
        (hf.Llama4TextConfig(attention_chunk_size=2048), 2047),
        (hf.DogeConfig(keep_window_size=1024), 1024),
    ],
)
def test_windows_and_chunks(hf_config: PreTrainedConfig, reach: int | None) -> None:
    """A layer that sees n tokens keeps n - 1 of them besides the one that asks."""
    found = read_capabilities(hf_config).context_limits
    assert [each.tokens for each in found] == ([] if reach is None else [reach])


def test_longrope_ends_where_its_angles_change() -> None:
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    found = read_capabilities(
        hf.Phi3Config(rope_parameters=longrope, max_position_embeddings=131072, original_max_position_embeddings=4096)
    )
    assert (found.max_positions, found.rope_types) == (4096, ("longrope",))


@pytest.mark.parametrize(("heads", "layout"), [(4, "MHA"), (2, "GQA"), (1, "MQA")])
def test_layout_of_heads(heads: int, layout: str) -> None:
    assert read_capabilities(LlamaConfig(**(SMALL | {"num_key_value_heads": heads}))).layout == layout


def test_learned_positions_cannot_be_moved_and_the_message_says_what_can(tmp_path: Path) -> None:
    hf.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"(?s)kv_source=gather with .*=compact is rejected for model type 'gpt2': .*learned"
    ) as told:
        tiny.load(tmp_path, "prefix.kv_source=gather")
    rows = [line.split() for line in str(told.value).splitlines()[1:]]
    assert [row[-1] for row in rows] == ["works", "works", "rejected", "works"]
    found = read_capabilities(hf.GPT2Config())
    for others in (["prefix.kv_source=gather", "injection.positioning_mode=absolute"], ["prefix.kv_source=prefill"]):
        check_supported(found, tiny.config(tmp_path, *others))


def test_a_window_shorter_than_the_samples_is_rejected_before_weights_are_loaded(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 slots or the demo, then the query; the window is shorter. With a wider one the same samples run."""
    folder = tiny.save(tmp_path / "model", "mistral", sliding_window=32)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(
        DataError, match=r"4 of 4 ON samples .* needs \d+ slots and tokens .* the model has 31 \(4 of 4 layers see 32 tokens"
    ):
        run_phase2(tiny.config(folder), "1.5")


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
        ("mid33", 30, range(10, 20)),  # ceil(9.9) = 10
        ("mid33", 24, range(8, 16)),
        ("mid50", 5, range(1, 4)),  # ceil(2.5) = 3
        ("mid33", 32, range(10, 21)),  # 11 layers, 10 before and 11 after them: the earlier ones
        ("mid40", 5, [1, 2]),  # one before and two after
        ("mid1", 4, [1]),
        ("mid7", 100, range(46, 53)),
        ("mid99", 3, range(3)),
        ("mid100", 30, range(30)),
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
        check_supported(read_capabilities(LlamaConfig(**SMALL)), tiny.config("x", f"{key}=[0,4]"))
