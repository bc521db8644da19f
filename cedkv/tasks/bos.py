"""Who puts BOS in front of a text: the tokenizer, or the chat template. Told by token ids, however BOS is written."""

from __future__ import annotations

from typing import Any, Literal

from cedkv.core.errors import DataError
from cedkv.tasks.chat import ChatTemplate
from cedkv.tasks.control_tokens import TextEncoder

BosSource = Literal["tokenizer", "chat template"]


def leading_bos(tokenizer: Any, encoder: TextEncoder, chat: ChatTemplate | None) -> tuple[tuple[int, ...], BosSource | None]:
    """Return the BOS token that texts of a model begin with, if they do, and who puts it there.

    A model trained on prompts with BOS gets BOS in every arm. It is the single token that the tokenizer adds in front of a
    text; else the tokenizer's ``bos_token``, where it is the first token of a user's turn by the chat template, and no other.
    (As the mark of every turn, as in SmolLM2's template, it does not count.)

    Raises:
        DataError: the tokenizer adds other tokens in front of a text.
    """
    added = _added_in_front(tokenizer)
    bos = tokenizer.bos_token_id
    if added:
        if len(added) > 1 or (bos is not None and added != (bos,)):
            raise DataError(
                f"the tokenizer starts a text with {tokenizer.convert_ids_to_tokens(added)}; only a single BOS "
                "token is supported, because a prefix keeps exactly that token"
            )
        return added, "tokenizer"
    if chat is None or bos is None:
        return (), None
    before, after, _ = chat.user_turn
    text = f"{before}x{after}"
    ids, _ = encoder.encode("x", text, [(0, len(before)), (len(before) + 1, len(text))])
    return ((bos,), "chat template") if ids[:1] == [bos] and ids.count(bos) == 1 else ((), None)


def _added_in_front(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a tokenizer adds in front of a text. Raises DataError: it changes the text's own tokens."""
    ids = tokenizer("x", add_special_tokens=False).input_ids
    with_special = tokenizer("x").input_ids
    for start in range(len(with_special) - len(ids) + 1):
        if with_special[start : start + len(ids)] == ids:
            return tuple(with_special[:start])
    raise DataError("the tokenizer changes a text's own tokens when it adds special tokens; this is not supported")
