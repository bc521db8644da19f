"""Tokenizers out of a GGUF file's vocabulary: ids of a plain implementation, and every text comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import ModelError
from cedkv.models import opening
from cedkv.models.gguf_tokenizer import build_tokenizer
from tests.oracle.outside_bpe import PlainBpe, PlainSentencePiece, byte_table, texts
from tests.support import gguf_making, tiny, zoo

CONTROL, USER_DEFINED = 3, 4
QWEN2 = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = regex.compile(QWEN2.pattern.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
MERGES = [
    "Ġ Ġ", "Ċ Ċ", "ĠĠ ĠĠ", "h i", "Ġ h", "Ġh i", "1 2", "12 3", "Ġ 1", "2 3", "! !", "! Ċ", "' S", "' s", "i t", "( x", "x :",
    ". .", ".. ..", "Ċ ĊĊ", "č Ċ", "Ã ¯", "a b", "ab ab", "A A", "t h", "e r", "th e",
]  # fmt: skip
SPECIAL, WHOLE = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<tool_call>", "</tool_call>"]
BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "gpt-2": {"digits": False},
    "smollm": {},
    "qwen2": {"digits": False, "pattern": QWEN2},
    "llama-bpe": {"digits": False, "pattern": LLAMA3, "whole_words": True},
}
TEXTS = [
    *texts(150),
    "<tool_call>{}</tool_call>",
    "123 1234 12345",
    "it's IT'S",
    "!!\n!! (x) f(x):",
    "a  hi   hi\n\n\n\nhi",
    "<tool",
]


def byte_level(pre: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a byte-level vocabulary. A token that no merge makes is last: ``whole_words`` finds it."""
    tokens = [*byte_table().values(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL, *WHOLE, "hello"]
    types = [CONTROL if token in SPECIAL else USER_DEFINED if token in WHOLE else 1 for token in tokens]
    return {
        "ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": tokens, "ggml.token_type": types, "ggml.merges": MERGES,
        "ggml.bos_token_id": tokens.index("<|endoftext|>"), "ggml.eos_token_id": tokens.index("<|im_end|>"), **changes,
    }  # fmt: skip


def sentencepiece(kind: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece vocabulary of a few hundred pieces; ``gemma``: with runs of spaces and line breaks."""
    raw = zoo.sentencepiece(kind)
    tokens = [raw.id_to_token(index) for index in range(raw.get_vocab_size())]
    whole = ["\n", "\n\n", "\n\n\n", "  ", "   ", "<h1>"] if kind == "gemma" else []
    types = {"<unk>": 2, "<s>": CONTROL, "</s>": CONTROL, **{f"<0x{byte:02X}>": 6 for byte in range(256)}}
    tokens = [token for token in tokens if token not in whole] + whole
    return {
        "ggml.model": "llama", "ggml.tokens": tokens,
        "ggml.token_type": [USER_DEFINED if token in whole else types.get(token, 1) for token in tokens],
        "ggml.scores": [-1000.0 if token in whole else -float(index) for index, token in enumerate(tokens)],
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0, "ggml.add_space_prefix": kind != "gemma",
        **changes,
    }  # fmt: skip


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_ids_equal_a_plain_bpe_and_text_comes_back(pre: str) -> None:
    values = byte_level(pre)
    tokenizer = build_tokenizer("m.gguf", "qwen2", values)
    reference = PlainBpe(values["ggml.tokens"], MERGES, [*SPECIAL, *WHOLE], **BYTE_LEVEL[pre])
    for text in [*TEXTS, "hello"]:
        ids = plain_ids(tokenizer, text)
        assert ids == reference(text), text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["prepend", "gemma"])
def test_sentencepiece_ids_equal_a_plain_one_and_text_comes_back(kind: str) -> None:
    """Merges are not in the file. Gemma's: spaces are kept, runs of spaces and line breaks are tokens, none is put in front."""
    values = sentencepiece(kind)
    tokens, scores = values["ggml.tokens"], values["ggml.scores"]
    whole = [token for token, its in zip(tokens, values["ggml.token_type"], strict=True) if its in (CONTROL, USER_DEFINED)]
    tokenizer = build_tokenizer("m.gguf", "gemma3" if kind == "gemma" else "llama", values)
    reference = PlainSentencePiece(tokens, scores, whole, "" if kind == "gemma" else "▁")
    for text in [*TEXTS, "<h1>  a\n\n\n\nb   \t", "<s>x</s>"]:
        ids = plain_ids(tokenizer, text)
        assert ids == reference(text), text
        if kind == "gemma" or not any(token in text for token in whole):  # else a space in front of every part between them
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokens[plain_ids(tokenizer, "a  b\n\n")[0]] == ("a" if kind == "gemma" else "▁a")


def test_merges_follow_scores_for_llama_and_the_order_of_tokens_for_gemma() -> None:
    """``abc`` is ``ab c`` or ``a bc``: scores prefer the second, the order of tokens the first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc"]
    types = [2, 3, 3, *[6] * 256, *[1] * 6]
    scores = [0.0] * (len(tokens) - 2) + [-2.0, -1.0]
    values = sentencepiece("gemma") | {"ggml.tokens": tokens, "ggml.token_type": types, "ggml.scores": scores}
    pieces = {kind: build_tokenizer("m.gguf", kind, values).tokenize("abc") for kind in ("llama", "gemma3")}
    assert pieces == {"llama": ["a", "bc"], "gemma3": ["ab", "c"]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (byte_level("qwen2"), False),
        (byte_level("llama-bpe"), True),
        (byte_level("llama-bpe", **{"ggml.add_bos_token": False}), False),
        (byte_level("qwen2", **{"ggml.add_bos_token": True}), True),
        (sentencepiece("prepend"), True),
        (sentencepiece("gemma", **{"ggml.add_bos_token": False}), False),
    ],
)
def test_bos_is_added_where_the_file_says_so_or_llama_cpp_does(values: dict[str, Any], expected: bool) -> None:
    tokenizer = build_tokenizer("m.gguf", "llama", values)
    ids = tokenizer("hi").input_ids
    assert (ids[0] == values["ggml.bos_token_id"]) is expected
    assert ids[expected:] == plain_ids(tokenizer, "hi")


def test_special_tokens_and_the_chat_template_are_the_files() -> None:
    tokenizer = build_tokenizer("m.gguf", "qwen2", byte_level("qwen2", chat_template="{{ messages }}"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert tokenizer.chat_template == "{{ messages }}"
    ids = plain_ids(tokenizer, "<|im_start|><tool_call>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>", "matched whole, but not special"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (byte_level("default"), r"tokenizer\.ggml\.pre is 'default'"),
        (byte_level("qwen2", **{"ggml.tokens": None}), "no vocabulary"),
        ({**byte_level("qwen2"), "ggml.tokens": [*byte_level("qwen2")["ggml.tokens"][:-1], "hi"]}, "has a token twice"),
        (byte_level("qwen2", **{"ggml.merges": ["q q"]}), "contradicts itself: .*`qq` out of vocabulary"),
        (byte_level("qwen2", **{"ggml.eos_token_id": 10**6}), "contradicts itself"),
        (sentencepiece("gemma", **{"ggml.model": "t5"}), "is 't5'; known are gpt2 and llama"),
    ],
    ids=["pre", "no tokens", "a token twice", "a merge into nothing", "no such EOS", "unigram"],
)
def test_a_tokenizer_that_cannot_be_built_exactly_is_rejected(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        build_tokenizer("m.gguf", "qwen2", values)


# --- a tokenizer that was stored is checked when it is loaded


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], Any]:
    """Load the tokenizer of a Gemma 3 file with its own kind of vocabulary."""
    values = sentencepiece("gemma", chat_template=tiny.CHAT_TEMPLATE)
    model = tiny.model("gemma3_text", **gguf_making.SMALL_GEMMA3, vocab_size=len(values["ggml.tokens"]))
    metadata = {f"tokenizer.{key}": value for key, value in values.items()} | gguf_making.described(model, "gemma3")
    path = gguf_making.write(tmp_path / "m.gguf", "gemma3", metadata, gguf_making.tensors(model, "gemma3"))
    config = tiny.config(path, f"model.cache_dir={tmp_path / 'cache'}")
    return lambda: opening.open_spec(config).tokenizer


def test_what_is_loaded_is_what_was_built(opened: Callable[[], Any]) -> None:
    tokenizer = opened()
    built = build_tokenizer("m.gguf", "gemma3", sentencepiece("gemma"))
    assert [tokenizer(text).input_ids for text in TEXTS] == [built(text).input_ids for text in TEXTS]
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer("hi").input_ids[0] == tokenizer.bos_token_id == 1


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["Symbol"]), "became"),
        (lambda tokenizer: tokenizer.add_tokens(["never seen"]), "its vocabulary is another one"),
        (lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", None), "became"),
    ],
    ids=["another merge", "another vocabulary", "another class"],
)
def test_a_tokenizer_that_came_back_as_another_is_rejected(
    damage: Callable[[Any], object], match: str, opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with transformers 5.23: rebuilt as another class, it turned every space into another token, without a word."""
    tokenizer = opened()
    damage(tokenizer)
    monkeypatch.setattr(opening, "load_tokenizer", lambda *_: tokenizer)
    with pytest.raises(ModelError, match=f"m.gguf: the tokenizer made from it is read differently.*{match}"):
        opened()
