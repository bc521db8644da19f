"""Every architecture that transformers has: what it can do is read from its configuration, or it is rejected by name."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from cedkv.core.errors import ModelError
from cedkv.models.capabilities import read_capabilities


def test_every_architecture_is_read_or_rejected_by_name() -> None:
    """No configuration of transformers' own, of whatever model, ends in anything but capabilities or a rejection."""
    read, rejected = [], []
    for kind in CONFIG_MAPPING_NAMES:
        try:
            hf_config = CONFIG_MAPPING[kind]()
        except Exception:
            continue
        try:
            read.append(read_capabilities(hf_config).model_type)
        except ModelError:
            rejected.append(kind)
    assert {"llama", "qwen3", "gemma3_text", "gpt2"} <= set(read)
    assert {"bert", "clip", "vit", "whisper", "wav2vec2", "mamba", "gptj", "roformer", "deepseek_v3"} <= set(rejected)
    assert not [kind for kind in read if "vision" in kind or "audio" in kind]
