"""Load the model's tokenizer exactly as its files define it, and check it before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from cedkv.core.errors import ModelError
from cedkv.core.text import one_line
from cedkv.models.capabilities import LEAST_CONTEXT

_PROBE = "\nWord: blick\nSymbol: red\n\nIt's 1 of 27.\n"


def load_tokenizer(source: str, options: dict[str, Any], vocabulary: int, chat: bool) -> Any:
    """Return the tokenizer of a model folder or hub id.

    ``tokenizer.json`` is used unchanged if it exists. ``AutoTokenizer`` would rebuild it from its vocabulary by the rules of a
    class, which can differ from those of the file (seen with 5.23: other tokens for two spaces at a text's start), without a
    warning; it is used only for models without that file.

    Args:
        source: folder or hub id.
        options: keyword arguments of ``from_pretrained``.
        vocabulary: rows of the model's embedding.
        chat: whether to keep the chat template; without one, prompts are plain text.

    Raises:
        ModelError: the tokenizer is missing, gives no character offsets, loses text, or belongs to another model.
    """
    try:
        tokenizer = _read(source, options)
    except Exception as error:  # every tokenizer format has its own parser, with its own exceptions
        raise ModelError(
            f"{source}: its tokenizer cannot be read: {one_line(error)}\n"
            "A model needs its tokenizer.json (or files it can be made from: vocab.json and merges.txt; tokenizer.model with "
            "the package sentencepiece installed). Download the complete model folder again, or save the tokenizer on a "
            "machine where it loads: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{source}: its tokenizer gives no character offsets (it is not a fast tokenizer), without which demo and query "
            "cannot be split; use a model that has a tokenizer.json"
        )
    unknown = [token for token, index in _base_vocabulary(tokenizer).items() if index >= vocabulary]
    if unknown:
        raise ModelError(
            f"{source}: its tokenizer has {len(unknown)} tokens (such as {unknown[0]!r}) beyond the model's vocabulary of "
            f"{vocabulary}: it belongs to another model; take the tokenizer of this one"
        )
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if decoded.removeprefix(" ") != _PROBE:  # some tokenizers add a space in front of a text
        raise ModelError(
            f"{source}: its tokenizer does not reproduce a text: {_PROBE!r} became {decoded!r}. It drops case, spaces or line "
            "breaks, which demos are made of (T5 and BERT kinds do), or was saved by another version of transformers, or is "
            "damaged. In the last two cases save or download it again; else use another model"
        )
    if not chat:
        tokenizer.chat_template = None
    return tokenizer


def check_probeable(tokenizer: Any, vocabulary: int) -> None:
    """Raise if a model has too few tokens to be checked against itself.

    Raises:
        ModelError: fewer than ``LEAST_CONTEXT`` tokens that are not control tokens.
    """
    ordinary = len(ordinary_tokens(tokenizer, vocabulary))
    if ordinary < LEAST_CONTEXT:
        raise ModelError(
            f"the model has {ordinary} tokens that are not control tokens (vocabulary {vocabulary}, tokenizer "
            f"{len(tokenizer)}): {LEAST_CONTEXT} are needed to check it. Take the tokenizer of this model, or another model"
        )


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """Return the ids of the tokens that are not control tokens."""
    special = set(tokenizer.all_special_ids)
    return [token for token in range(min(len(tokenizer), vocabulary)) if token not in special]


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of one token within a text, see ``tokens_text``; of a row of the vocabulary without a token, its id."""
    if tokenizer.convert_ids_to_tokens(token) is None:
        return f"[token {token}]"
    return tokens_text(tokenizer, [token])


def tokens_text(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Return the text of tokens within a text: decoded alone, a SentencePiece token would lose its leading space.

    Args:
        skip_special_tokens: whether to leave control tokens out.
    """
    anchor = tokenizer("x", add_special_tokens=False).input_ids[-1:]
    options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": skip_special_tokens}
    without, with_tokens = (tokenizer.decode(ids, **options) for ids in (anchor, [*anchor, *tokens]))
    return str(with_tokens.removeprefix(without))


def _read(source: str, options: dict[str, Any]) -> Any:
    if Path(source).is_dir():
        has_tokenizer_json = (Path(source) / "tokenizer.json").is_file()
    else:
        hub = {name: options[name] for name in ("revision", "cache_dir") if name in options}
        path = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
        has_tokenizer_json = path is not None
    return (PreTrainedTokenizerFast if has_tokenizer_json else AutoTokenizer).from_pretrained(source, **options)


def _base_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return the vocabulary without added tokens: some stand for inputs (images) that only a larger sibling model reads."""
    vocabulary: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return vocabulary
