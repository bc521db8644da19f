"""Tiny random models of many families, built from their real configuration classes, and what becomes of each here.

``python -m tests.families.models`` writes ``cedkv/models/families.json``, which ``cedkv list models`` shows, and the table of
docs/models.md; tests keep both in step. Nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from cedkv.checks.certificate import Certificate, certify
from cedkv.core.errors import ModelError
from cedkv.models import loading
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import open_spec
from tests.support import tiny

ROOT = Path(__file__).parents[2]
PAGE, TABLE = ROOT / "docs" / "models.md", ROOT / "cedkv" / "models" / "families.json"
Row = dict[str, str]
"""``family``, ``model_type``, ``verdict`` and ``remarks``: positions, limits, reasons."""
START, END = "<!-- models: python -m tests.families.models -->\n", "<!-- /models -->\n"
SMALL = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 600}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """Rotary settings of one type."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


@dataclass(frozen=True)
class Family:
    """A row of the table. ``rejected``: part of the reason, where it is rejected before its weights are loaded."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    rejected: str | None = None


FAMILIES = (
    Family("Llama", "llama", GROUPED),
    Family("Llama, rope linear", "llama", GROUPED | rope("linear", factor=4.0)),
    Family("Llama, rope dynamic", "llama", GROUPED | rope("dynamic", factor=4.0)),
    Family("Llama, rope YaRN", "llama", GROUPED | rope("yarn", factor=4.0, original_max_position_embeddings=256)),
    Family("Llama 3.1", "llama", GROUPED | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                               original_max_position_embeddings=128)),
    Family("Llama, one key head", "llama", {"num_key_value_heads": 1}),
    Family("Llama 4 (text)", "llama4_text", GROUPED | MOE | {"num_local_experts": 4, "attention_chunk_size": 600,
                                                             "intermediate_size_mlp": 64}),
    Family("Qwen2", "qwen2", GROUPED),
    Family("Qwen2, with windows", "qwen2", GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    Family("Qwen3", "qwen3", GROUPED),
    Family("Qwen3-MoE", "qwen3_moe", GROUPED | MOE | {"num_experts": 4}),
    Family("Mistral", "mistral", GROUPED | {"sliding_window": None}),
    Family("Mistral, with windows", "mistral", GROUPED | WINDOW),
    Family("Mixtral", "mixtral", GROUPED | MOE | {"num_local_experts": 4}),
    Family("Ministral 3", "ministral3", GROUPED),
    Family("Ministral 3, queries scaled", "ministral3", GROUPED | rope("yarn", factor=4.0, original_max_position_embeddings=50,
                                                                      llama_4_scaling_beta=0.5)),
    Family("Gemma", "gemma", GROUPED),
    Family("Gemma 2", "gemma2", GROUPED | WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    Family("Gemma 3 (text)", "gemma3_text", GROUPED | WINDOW | ALTERNATE | {"query_pre_attn_scalar": 16}),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3", {"num_key_value_heads": 2}),
    Family("Phi-3, longrope", "phi3", {"num_key_value_heads": 2, "original_max_position_embeddings": 512} | rope(
        "longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=512)),
    Family("GPT-NeoX (Pythia)", "gpt_neox"),
    Family("StableLM", "stablelm", {"num_key_value_heads": 2}),
    Family("Persimmon", "persimmon"),
    Family("Cohere", "cohere", {"num_key_value_heads": 2}),
    Family("Cohere 2", "cohere2", {"num_key_value_heads": 2} | WINDOW | ALTERNATE),
    Family("GLM", "glm", GROUPED),
    Family("GLM-4-MoE", "glm4_moe", GROUPED | MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    Family("ERNIE 4.5", "ernie4_5", GROUPED),
    Family("Helium", "helium", GROUPED),
    Family("Granite", "granite", {"num_key_value_heads": 2}),
    Family("Granite SWA", "granite_swa", {"num_key_value_heads": 2} | WINDOW | ALTERNATE),
    Family("OLMo 2", "olmo2", {"num_key_value_heads": 2}),
    Family("OLMo 3", "olmo3", {"num_key_value_heads": 2} | WINDOW | ALTERNATE),
    Family("StarCoder2", "starcoder2", {"num_key_value_heads": 2}),
    Family("SmolLM3", "smollm3", {"num_key_value_heads": 2}),
    Family("EXAONE 4", "exaone4", {"num_key_value_heads": 2} | WINDOW | ALTERNATE),
    Family("Apertus", "apertus", {"num_key_value_heads": 2}),
    Family("Seed-OSS", "seed_oss", GROUPED),
    Family("BitNet", "bitnet", {"num_key_value_heads": 2}),
    Family("nanochat", "nanochat", {"num_key_value_heads": 2}),
    Family("AFMoE", "afmoe", GROUPED | MOE | WINDOW | {"num_experts": 4, "num_dense_layers": 1}),
    Family("Doge", "doge", GROUPED),
    Family("gpt-oss", "gpt_oss", GROUPED | MOE | WINDOW | ALTERNATE | {"num_local_experts": 4}),
    Family("GPT-2", "gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}),
    Family("OPT", "opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    Family("GPT-BigCode", "gpt_bigcode", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}),
    Family("GPT-J", "gptj", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}, "neither rotary"),
    Family("CodeGen", "codegen", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}, "neither rotary"),
    Family("Falcon", "falcon", {}, "computed inside the model"),
    Family("Falcon, ALiBi", "falcon", {"alibi": True}, "ALiBi"),
    Family("BLOOM", "bloom", {}, "ALiBi"),
    Family("MPT", "mpt", {}, "ALiBi"),
    Family("BERT", "bert", {}, "neither rotary"),
    Family("DeepSeek-V3", "deepseek_v3", {}, "latent vectors"),
    Family("MiniCPM3", "minicpm3", {}, "latent vectors"),
    Family("Gemma 3n (text)", "gemma3n_text", {}, "keys and values of others"),
    Family("Mamba", "mamba", {}, "names no attention layers"),
    Family("RWKV", "rwkv", {}, "names no attention layers"),
    Family("xLSTM", "xlstm", {}, ""),
    Family("RecurrentGemma", "recurrent_gemma", {}, "something else than keys"),
    Family("Jamba", "jamba", {}, "something else than keys"),
    Family("Bamba", "bamba", {}, "something else than keys"),
    Family("Zamba2", "zamba2", {}, "something else than keys"),
    Family("Falcon-H1", "falcon_h1", {}, "something else than keys"),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}, "something else than keys"),
    Family("Qwen3-Next", "qwen3_next", {}, "something else than keys"),
    Family("MiniMax", "minimax", {}, "something else than keys"),
    Family("T5", "t5", {}, "encoder-decoder"),
    Family("BART", "bart", {}, "encoder-decoder"),
    Family("LLaVA", "llava", {}, "wrapper"),
    Family("Gemma 3 (vision)", "gemma3", {}, "wrapper"),
    Family("Qwen2-VL", "qwen2_vl", {}, "wrapper"),
)  # fmt: skip


def save(family: Family, folder: Path) -> Path:
    """The family's tiny model and a tokenizer; of one that has to be rejected, the configuration alone."""
    if family.rejected is not None:
        AutoConfig.for_model(family.model_type, **family.settings).save_pretrained(folder)
        return folder
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.model_type, **SMALL | family.settings), dtype=torch.float32
    )
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # with the usual 0.02 an error in positions would not show
        elif "bias" in name or "sinks" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def judged(family: Family, folder: Path) -> tuple[Row, LanguageModel | None, Certificate | None]:
    """The family's row of the table, and, where it is not rejected, the loaded model and its certificate."""

    def row(verdict: str, remarks: str) -> Row:
        return {"family": family.name, "model_type": family.model_type, "verdict": verdict, "remarks": remarks}

    config = tiny.config(save(family, folder))
    try:
        open_spec(config)
    except ModelError as error:
        return row("rejected", "; ".join(line.split(maxsplit=1)[1] for line in str(error).splitlines()[1:-1])), None, None
    lm = loading.load(config)
    found = certify(lm, fingerprint(lm), None)
    limits = [f"{limit.reason}: sequences must stay below" for limit in lm.capabilities.context_limits]
    if {"longrope", "dynamic"} & set(lm.capabilities.rope_types):
        limits.append("sequences within the length the model was first trained with")
    rejected = [pair for pair, reason in found.can.items() if reason is not None]
    if rejected:
        limits.append(f"no {' and no '.join(rejected)}: {found.can[rejected[0]]}")
    if not found.certified:
        return row("fails", ", ".join(found.failed([]))), lm, found
    return row("works with limits" if limits else "works", "; ".join([positions(lm), *limits])), lm, found


def positions(lm: LanguageModel) -> str:
    """The kind of positions, as measured."""
    if lm.rope_layouts is None:
        return f"{lm.capabilities.positions} positions"
    turning = [turn for turn in lm.rope_layouts if len(turn.inv_freq)]
    words = ["rotary", ", ".join(lm.capabilities.rope_types)]
    if any(turn.layout == "neighbours" for turn in turning):
        words.append("neighbouring pairs")
    if any(float(turn.inv_freq[0]) < 0 for turn in turning):
        words.append("backwards")
    if 2 * len(turning[0].inv_freq) < 16:
        words.append(f"{2 * len(turning[0].inv_freq)} of 16 dimensions")
    if len({tuple(turn.inv_freq.tolist()) for turn in turning}) > 1:
        words.append("two frequency bases")
    if len(turning) < len(lm.rope_layouts):
        words.append(f"{len(lm.rope_layouts) - len(turning)} of {len(lm.rope_layouts)} layers without positions")
    return ", ".join(words)


def table() -> dict[str, Any]:
    """The whole table, every family judged anew by the installed transformers."""
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(judged(family, Path(folder))[0])
    return {"transformers": transformers.__version__, "families": rows}


def written() -> dict[str, Any]:
    """The table as the package has it."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def markdown(rows: list[Row]) -> str:
    """The table as docs/models.md has it."""
    lines = [f"| {row['family']} | `{row['model_type']}` | {row['verdict']} | {row['remarks']} |\n" for row in rows]
    return "".join(["| family | model type | here | positions, limits, reasons |\n", "| --- | --- | --- | --- |\n", *lines])


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = table()
    TABLE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(before + START + markdown(made["families"]) + END + after, encoding="utf-8")
