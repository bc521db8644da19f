"""Tiny models of real architectures with random weights, and a tokenizer to go with them; nothing is downloaded.

The weights are scaled up: with the usual 0.02 a tiny model's answer hardly depends on positions or context, and an error
in either would not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cedkv.checks import certificate
from cedkv.conditions import Condition
from cedkv.config.extensions import SELECTORS
from cedkv.config.options import Phase
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.inference.head_weights import ensure_head_weights
from cedkv.models import loading
from cedkv.models.fingerprint import fingerprint
from cedkv.tasks.load import load_samples
from cedkv.tasks.off_prompts import FORMS, TOPICS
from cedkv.tasks.symbol_lookup import SYMBOLS
from cedkv.units import plan_samples

CHAT_TEMPLATE = (
    "{% for m in messages %}<user>\n{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<bot>\n{% endif %}"
)
ARCHITECTURES = ("llama", "qwen2")
MODES = tuple(SELECTORS.builtin)
SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 128}  # fmt: skip
"""Sizes for the configuration class of a model that runs no text."""


def tokenizer(bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every symbol is one token; with ``bos`` it puts BOS in front of a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<user>", "<end>", "<bot>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [f"Word: x\nSymbol: {symbol}\n\n" * 20 for symbol in SYMBOLS] + [f"What is {t}?" for t in TOPICS] + list(FORMS)
    raw.train_from_iterator(lines, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )  # fmt: skip
    made.chat_template = CHAT_TEMPLATE if chat else None
    return made


def model(architecture: str, seed: int = 0, **settings: Any) -> Any:
    """A 4-layer model with grouped heads (4 query, 2 key/value), float32."""
    common = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1, **settings,
    }  # fmt: skip
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **common))
    return made.to(torch.float32).eval()


def save(folder: Path, architecture: str = "llama", bos: bool = False, chat: bool = True, **settings: Any) -> Path:
    """Model and tokenizer as a local model folder."""
    model(architecture, **settings).save_pretrained(folder)
    tokenizer(bos, chat).save_pretrained(folder)
    return folder


def save_without_weights(folder: Path) -> Path:
    """A local model folder whose weights are not there."""
    save(folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


def save_with(folder: Path, its: PreTrainedTokenizerFast, architecture: str = "llama", **settings: Any) -> Path:
    """A model that knows just this tokenizer's tokens, and the tokenizer, as a local model folder."""
    model(architecture, **{"vocab_size": len(its), **settings}).save_pretrained(folder)
    its.save_pretrained(folder)
    return folder


def config(folder: Path | str, *overrides: str) -> Phase2Config:
    """A small configuration of a model folder."""
    small = [
        f"model.id={folder}", "runtime.device=cpu", "runtime.batch_size=4", "eval.on_samples=6", "eval.off_samples=8",
        "eval.gate_a_samples=4", "eval.n_random_trials=2", "eval.repro_runs=2", "prefix_len=24", "select.span_len=4",
        "select.span_budget=3", "select.min_span_distance=4", "data.pairs=4",
    ]  # fmt: skip
    return resolve(None, [*small, *overrides])


def load(folder: Path | str, *overrides: str) -> tuple[Phase2Config, loading.LanguageModel]:
    """A small configuration and its loaded model."""
    made = config(folder, *overrides)
    return made, loading.load(made)


def grid_records(
    folder: Path | str, conditions: Mapping[str, Sequence[str]], *overrides: str, phase: Phase = "2", steps: Any = None
) -> dict[str, list[Record]]:
    """The records of several conditions, each given by its overrides, in one run of the engine."""
    made = {key: config(folder, *overrides, *own) for key, own in conditions.items()}
    first = next(iter(made.values()))
    lm = loading.load(first)
    ensure_head_weights(lm, list(made.values()), fingerprint(lm), certificate.measurements_folder(None, "head_weights"))
    samples = load_samples(first, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    grid = [Condition(key, its) for key, its in made.items()]
    units = plan_samples(grid, samples, phase)
    found: dict[str, list[Record]] = {key: [] for key in made}
    for _, records in run_units(lm, grid, samples, units, phase, steps or (lambda *_: None)):
        for key, new in records.items():
            found[key] += new
    return found


def records(folder: Path | str, *overrides: str, phase: Phase = "2") -> list[Record]:
    """The records of one condition."""
    return grid_records(folder, {"run": ()}, *overrides, phase=phase)["run"]
