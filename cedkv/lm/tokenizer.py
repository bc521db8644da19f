"""The model's tokenizer, checked before anything is made with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cedkv.errors import ModelError
from cedkv.lm import smollm2

_PROBE = "Word: blick\nSymbol: red\n\nIt's 1 of 27."


def load_tokenizer(where: str, options: dict[str, Any]) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        ModelError: it gives no character offsets, or does not give a text back.
    """
    loader = PreTrainedTokenizerFast if Path(where).name.startswith(smollm2.NAME) else AutoTokenizer
    tokenizer = loader.from_pretrained(where, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{where}: its tokenizer gives no character offsets (it is not a fast one); demo and query need them")
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.strip() != _PROBE:
        raise ModelError(
            f"{where}: its tokenizer does not give a text back: {_PROBE!r} became {back!r}; it was saved by another "
            "version of transformers, or is damaged. Save or download it again"
        )
    return tokenizer
