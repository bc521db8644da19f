"""Real tokenizers of every kind that language models have, each trained on a few lines in a moment.

Byte-level BPE (GPT-2, Qwen, Llama 3), BPE on SentencePiece's terms with byte fallback (Llama 2, Mistral, Gemma), Unigram (XGLM,
T5), WordPiece (BERT).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cedkv.tasks.off_prompts import FORMS, TOPICS
from cedkv.tasks.symbol_lookup import SYMBOLS

LINES = [f"Word: x\nSymbol: {symbol}\n\n" * 20 for symbol in SYMBOLS] + [f"What is {t}?" for t in TOPICS] + list(FORMS)
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ASCII = [chr(code) for code in range(33, 127)]


def byte_level(prefix_space: bool = False, trim: bool = False) -> Tokenizer:
    """GPT-2's kind; ``trim``: offsets leave out spaces, as Llama 3's do."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    if trim:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    return raw


def sentencepiece(kind: str) -> Tokenizer:
    """BPE with byte fallback: ``prepend`` (Llama 2: a space in front of a text, by the normaliser), ``metaspace`` (the same by
    the pre-tokenizer), or ``gemma`` (no space in front)."""
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)|:"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *BYTES], initial_alphabet=["▁", *ASCII], show_progress=False
    )
    raw.train_from_iterator([line.replace("\n", " ") for line in LINES], trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if kind == "prepend":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.pre_tokenizer = None  # type: ignore[assignment]
    elif kind == "metaspace":
        raw.normalizer = None  # type: ignore[assignment]
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        steps = steps[:-1]
    raw.decoder = decoders.Sequence(steps)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return raw


def unigram(squeeze: bool = False) -> Tokenizer:
    """Unigram behind NFKC, with EOS at the end; ``squeeze``: all white space becomes one space, as T5 has it."""
    words = ["Word", "Symbol", *(f"▁{symbol}" for symbol in SYMBOLS)]
    scored = [(token, -2.0) for token in words] + [(token, -9.0) for token in ("▁", "\n", *ASCII)]
    raw = Tokenizer(models.Unigram([*((token, 0.0) for token in SPECIAL), *scored], unk_id=0))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    if squeeze:
        raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return raw


def wordpiece() -> Tokenizer:
    """BERT's kind: lower case, no spaces."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False))
    raw.decoder = decoders.WordPiece()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return raw


USABLE: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, space in front": lambda: byte_level(prefix_space=True),
    "byte-level, trimmed offsets": lambda: byte_level(trim=True),
    "sentencepiece, prepend": lambda: sentencepiece("prepend"),
    "sentencepiece, metaspace": lambda: sentencepiece("metaspace"),
    "sentencepiece, gemma": lambda: sentencepiece("gemma"),
    "unigram, NFKC": unigram,
}
LOSSY: dict[str, Callable[[], Tokenizer]] = {"unigram, T5": lambda: unigram(squeeze=True), "wordpiece": wordpiece}


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    """One of ``USABLE`` or ``LOSSY``; shared, so not to be changed."""
    raw = {**USABLE, **LOSSY}[name]()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
