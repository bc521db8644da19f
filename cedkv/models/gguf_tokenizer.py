"""Build a tokenizer from the vocabulary in a GGUF file, and check it at every load.

A GGUF file has no ``tokenizer.json``. What it states is the vocabulary, the kind of every token, and merges or scores; how text
is split before merges apply is only named (``tokenizer.ggml.pre``). Versions of transformers read the same file into different
tokenizers: 5.6 makes a Unigram of Gemma's BPE, and none knows the digit splitting of ``smollm``, or that ``llama-bpe`` puts
a word that is a token in front of all merges. The tokenizer is therefore built here, in the two forms that files of the
supported kinds have: byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import ModelError
from cedkv.core.text import one_line

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""GGUF's token types: text; special tokens; tokens that are matched as a whole but are not special."""
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, pattern in {"qwen2": _QWEN2, "llama-bpe": _LLAMA3}.items()
    },
}
"""``tokenizer.ggml.pre`` -> how llama.cpp splits text before the merges of a byte-level BPE apply."""
_WHOLE_WORDS = ("llama-bpe",)
"""Values of ``tokenizer.ggml.pre`` for which a word that is a token is that token, whatever the merges say."""
_ADDS_BOS = ("llama-bpe",)
"""Values of ``tokenizer.ggml.pre`` for which llama.cpp adds BOS where ``tokenizer.ggml.add_bos_token`` is missing."""
_PROBES = (
    "Word: blick\nSymbol: red\n\nIt's 1 of 27.\n",
    "a  b   c    d\t\te \n \n\n\n",
    "x\r\ny 2024-05-17 3.14",
    "naïve Straße café",
    "Ελληνικά русский עברית 日本語 한국어 ไทย",
    "e\u0301 🙂 👩\u200d👩\u200d👧 \u00a0\u3000.",
    "def f(x):\n    return {k: v}  # ok\n",
)
"""Texts with all that tokenizers lose: spaces, line breaks, digits, accents as characters of their own, other scripts."""


def build_tokenizer(name: str, architecture: str, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file describes, with its chat template; arguments as for ``_built``.

    Raises:
        ModelError: the file describes a tokenizer that cannot be built exactly; the message names what it is.
    """
    try:
        tokenizer = _built(name, architecture, metadata)
    except ModelError:
        raise
    except Exception as error:  # tokenizers has no exceptions of its own
        raise _unsupported(name, f"it contradicts itself: {one_line(error)}") from error
    return tokenizer


def _built(name: str, architecture: str, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return a file's tokenizer.

    Args:
        name: the file, for messages.
        architecture: ``general.architecture``.
        metadata: values under ``tokenizer.*``, without that prefix.
    """
    kind, tokens, types = metadata.get("ggml.model"), metadata.get("ggml.tokens"), metadata.get("ggml.token_type")
    if not tokens or not types or len(tokens) != len(types):
        raise _unsupported(name, "it has no vocabulary with a type for each token")
    if metadata.get("ggml.add_eos_token"):
        raise _unsupported(name, "tokenizer.ggml.add_eos_token is true: every text would end with EOS")
    special = [token for token, token_type in zip(tokens, types, strict=True) if token_type == _CONTROL]
    whole = [token for token, token_type in zip(tokens, types, strict=True) if token_type == _USER_DEFINED]
    if kind == "gpt2":
        pre = metadata.get("ggml.pre")
        if pre not in SPLITS or "ggml.merges" not in metadata:
            raise _unsupported(name, f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(SPLITS)}, with merges")
        backend = byte_level_bpe(tokens, metadata["ggml.merges"], special, whole, pre)
        adds_bos = metadata.get("ggml.add_bos_token", pre in _ADDS_BOS)
    elif kind == "llama":
        unknown = tokens[metadata.get("ggml.unknown_token_id", 0)]
        # Gemma's scores do not follow the order of its merges; the order of its tokens does.
        ranks = range(len(tokens)) if architecture == "gemma3" else [-score for score in metadata["ggml.scores"]]
        prefix = metadata.get("ggml.add_space_prefix", True)
        backend = sentencepiece_bpe(tokens, types, ranks, special, whole, unknown, prefix)
        adds_bos = metadata.get("ggml.add_bos_token", True)
    else:
        raise _unsupported(name, f"tokenizer.ggml.model is {kind!r}; known are gpt2 and llama")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {argument: metadata.get(f"ggml.{key}_token_id") for argument, key in names.items()}
    if adds_bos and ids["bos_token"] is not None:
        bos = tokens[ids["bos_token"]]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids["bos_token"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{argument: tokens[index] for argument, index in ids.items() if index is not None},
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata.get("chat_template")
    if tokenizer.convert_ids_to_tokens(range(len(tokenizer))) != tokens:
        raise _unsupported(name, f"its vocabulary of {len(tokens)} tokens has a token twice, or lacks a special one")
    return tokenizer


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], special: Sequence[str], whole: Sequence[str] = (), pre: str = "smollm"
) -> Tokenizer:
    """Build a byte-level BPE.

    Args:
        tokens: the vocabulary, in the order of ids.
        merges: pairs of tokens with a space between them, first merge first.
        special: control tokens.
        whole: other tokens that are matched as a whole.
        pre: how text is split, a key of ``SPLITS``.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
            ignore_merges=pre in _WHOLE_WORDS,
        )
    )
    tokenizer.pre_tokenizer = SPLITS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, special, whole)


def sentencepiece_bpe(
    tokens: Sequence[str],
    types: Sequence[int],
    ranks: Sequence[float],
    special: Sequence[str],
    whole: Sequence[str],
    unknown: str,
    add_prefix: bool,
) -> Tokenizer:
    """Build a SentencePiece BPE, whose merges a GGUF file does not list: each way to cut a token into two others is one.

    Args:
        tokens: the vocabulary, in the order of ids.
        types: GGUF's type of each token.
        ranks: the merges into the token of the lowest rank are made first.
        special: control tokens.
        whole: other tokens that are matched as a whole.
        unknown: the token of what not even single bytes cover.
        add_prefix: whether a space is put in front of a text.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    parts = {token for token, token_type in zip(tokens, types, strict=True) if token_type == _NORMAL}
    merges = [
        (ranks[vocabulary[token]], vocabulary[token[:cut]], vocabulary[token[cut:]])
        for token in parts
        for cut in range(1, len(token))
        if token[:cut] in parts and token[cut:] in parts
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(tokens[left], tokens[right]) for _, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if add_prefix else spaces
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
    return _with_added(tokenizer, special, whole)


def tokenizer_facts(name: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what ``check_tokenizer`` compares with: a digest of the vocabulary, and the ids of a few texts.

    Raises:
        ModelError: a text does not come back from its ids.
    """
    for text in _PROBES:
        decoded = _decoded(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
        if decoded.removeprefix(" ") != text:  # some tokenizers add a space in front of a text
            raise _unsupported(name, f"it does not reproduce a text: {text!r} became {decoded!r}")
    return {"vocabulary": _vocabulary_digest(tokenizer), "probes": [_ids(tokenizer, text) for text in _PROBES]}


def check_tokenizer(name: str, tokenizer: Any, facts: Mapping[str, Any]) -> None:
    """Raise if a tokenizer that was loaded again is not the one of ``facts``: another class may have rebuilt it.

    Raises:
        ModelError: another vocabulary, or other ids for a text; says which text.
    """
    changed = next((text for text, ids in zip(_PROBES, facts["probes"], strict=True) if _ids(tokenizer, text) != ids), None)
    if changed is not None or _vocabulary_digest(tokenizer) != facts["vocabulary"]:
        what = "its vocabulary is another one" if changed is None else f"{changed!r} became {_ids(tokenizer, changed)}"
        raise ModelError(
            f"{name}: the tokenizer made from it is read differently by the installed transformers and tokenizers: {what}. "
            "Scores would be of other tokens; install the versions that made it, or empty model.cache_dir and run again"
        )


def _with_added(tokenizer: Tokenizer, special: Sequence[str], whole: Sequence[str]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in whole])
    return tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _vocabulary_digest(tokenizer: Any) -> str:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _unsupported(name: str, reason: str) -> ModelError:
    return ModelError(
        f"{name}: the tokenizer in this GGUF file is rejected before anything is converted: {reason}. Another one would give "
        "other tokens without a word. Take the folder of the original model (config.json, *.safetensors, tokenizer.json)"
    )
