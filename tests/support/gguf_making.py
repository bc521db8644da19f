"""GGUF files of tiny models, as llama.cpp's converter writes them; nothing of ``cedkv``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import PreTrainedTokenizerFast

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GEMMA3_NAMES = {
    **NAMES, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
SMALL_GEMMA3 = {"num_hidden_layers": 7, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 24}
"""Settings of a tiny Gemma 3: every size has heads of 256, and one layer in six without a window."""
TYPES = {"<unk>": 2, "<s>": 3, "</s>": 3, "<user>": 3, "<end>": 3, "<bot>": 3}


def tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """A model's weights under the names, and in the layout, of a GGUF file."""
    names = GEMMA3_NAMES if architecture == "gemma3" else NAMES
    config, made = model.config, {}
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = key.rpartition(".")
        block = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            block = f"blk.{layer}."
        values, name = weight.numpy(), names[module]
        if architecture == "llama" and name in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and name.endswith("norm"):
            values = values + 1
        made[f"{block}{name}.{kind}"] = np.ascontiguousarray(values)
    return made


def described(model: Any, architecture: str) -> dict[str, Any]:
    """The metadata of a model, under ``architecture.``."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": float(rope["rope_theta"]),
        "attention.key_length": head_dim, "attention.value_length": head_dim,
    }  # fmt: skip
    if architecture == "llama":
        values |= {"rope.dimension_count": head_dim, "vocab_size": config.vocab_size}
    if architecture == "gemma3":
        values["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return {f"{architecture}.{key}": value for key, value in values.items()}


def vocabulary(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> dict[str, Any]:
    """A tokenizer as metadata: byte-level with ``pre``, SentencePiece, whose merges a file does not list, without."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    byte = {token: 6 for token in tokens if token.startswith("<0x")} if pre is None else {}
    values: dict[str, Any] = {
        "ggml.model": "llama" if pre is None else "gpt2", "ggml.tokens": tokens,
        "ggml.token_type": [(TYPES | byte).get(token, 1) for token in tokens],
        "ggml.bos_token_id": tokenizer.bos_token_id, "ggml.eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
    }  # fmt: skip
    merges = [" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    if pre is None:
        values |= {"ggml.scores": [-float(index) for index in range(len(tokens))], "ggml.unknown_token_id": 0}
    else:
        values |= {"ggml.pre": pre, "ggml.merges": merges}
    return {f"tokenizer.{key}": value for key, value in values.items() if value is not None}


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    types: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write a GGUF file; a key whose value is None is left out.

    Args:
        types: part of a tensor's name -> how the tensor is quantised; float32 without.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            adders[type(value)](key, value)
    for name, values in weights.items():
        kind = next((kind for part, kind in (types or {}).items() if part in name), None)
        writer.add_tensor(name, values if kind is None else quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
