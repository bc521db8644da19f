"""The model's tokenizer, read as its files say, and checked before anything is made with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from cedkv.core.errors import ModelError

_PROBE = "\nWord: blick\nSymbol: red\n\nIt's 1 of 27.\n"


def load_tokenizer(where: str, options: dict[str, Any], vocabulary: int, chat: bool) -> Any:
    """The tokenizer of a model folder or hub id.

    ``tokenizer.json`` is taken as it stands where there is one. ``AutoTokenizer`` would make it again from its vocabulary by
    the rules of a class, which are not always those of the file (seen with 5.23: other tokens for two spaces at a text's
    start), and says nothing; it serves what has no such file.

    Args:
        options: of ``from_pretrained``.
        vocabulary: rows of the model's embedding.
        chat: whether its chat template is wanted; without one, prompts are plain text.

    Raises:
        ModelError: there is none, or it gives no character offsets, loses text, or is another model's.
    """
    try:
        tokenizer = _read(where, options)
    except Exception as error:  # each kind of tokenizer file has its own parser, with errors of its own
        raise ModelError(
            f"{where}: its tokenizer cannot be read: {' '.join(str(error).split())[:300]}\n"
            "A model needs its tokenizer.json (or files it can be made from: vocab.json and merges.txt; tokenizer.model with "
            "the package sentencepiece installed). Download the model's folder again, whole, or save one from where its "
            "tokenizer loads: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{where}: its tokenizer gives no character offsets (it is not a fast one), without which demo and query cannot be "
            "told apart; use a model that has a tokenizer.json"
        )
    beyond = [token for token, index in _own_vocabulary(tokenizer).items() if index >= vocabulary]
    if beyond:
        raise ModelError(
            f"{where}: its tokenizer has {len(beyond)} tokens (such as {beyond[0]!r}) beyond the model's vocabulary of "
            f"{vocabulary}: it belongs to another model; take the tokenizer of this one"
        )
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.removeprefix(" ") != _PROBE:  # some put a space in front of a text
        raise ModelError(
            f"{where}: its tokenizer does not give a text back: {_PROBE!r} became {back!r}. It drops case, spaces or line "
            "breaks, which demos are made of (T5 and BERT kinds do), or was saved by another version of transformers, or is "
            "damaged. In the last two cases save or download it again; else use another model"
        )
    if not chat:
        tokenizer.chat_template = None
    return tokenizer


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token inside a text: alone, a SentencePiece token would lose the space at its start."""
    anchor = tokenizer("x", add_special_tokens=False).input_ids[-1:]
    before, both = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (anchor, [*anchor, token]))
    return str(both.removeprefix(before))


def _read(where: str, options: dict[str, Any]) -> Any:
    if Path(where).is_dir():
        there = (Path(where) / "tokenizer.json").is_file()
    else:
        hub = {name: options[name] for name in ("revision", "cache_dir") if name in options}
        there = cached_file(where, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub) is not None
    return (PreTrainedTokenizerFast if there else AutoTokenizer).from_pretrained(where, **options)


def _own_vocabulary(tokenizer: Any) -> dict[str, int]:
    """The vocabulary without added tokens: some of those stand for what only a larger sibling can read (images)."""
    found: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return found
