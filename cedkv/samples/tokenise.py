"""From text to tokens, once, jointly, with every boundary checked.

A demonstration and its query are tokenised as one text and split by character offsets: tokenising them apart would give
other tokens wherever a merge crosses the boundary. What cannot be split is an error that names the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cedkv.errors import DataError
from cedkv.types import OffSample, OnEpisode, OnSample, TokenKind

_CHAT_DATE = "01 Jan 2025"
"""Some chat templates print today's date unless told one; a prompt must be the same tomorrow."""


def leading_bos(tokenizer: Any) -> tuple[int, ...]:
    """``(bos_token_id,)`` where the tokenizer puts BOS in front of a text, else ``()``.

    Raises:
        DataError: it puts something else there.
    """
    plain = tokenizer("x", add_special_tokens=False).input_ids
    with_special = tokenizer("x").input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            leading = tuple(with_special[:start])
            if leading not in ((), (tokenizer.bos_token_id,)):
                raise DataError(
                    f"the tokenizer starts a text with {tokenizer.convert_ids_to_tokens(leading)}; only a single BOS "
                    "token is supported, because a prefix keeps exactly that"
                )
            return leading
    raise DataError("the tokenizer changes a text's own tokens when it adds special tokens; this is not supported")


def tokenise_on(tokenizer: Any, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly, split at the boundary, and find the answer's one token.

    Raises:
        DataError: a boundary inside a token, or an answer that is not one token; the message names the sample.
    """
    bos = leading_bos(tokenizer)
    demo, query, offsets = _split(tokenizer, episode, episode.query_text)
    answer = _answer_token(tokenizer, episode, episode.demo_text + episode.query_text, demo + query)
    bos_kind: TokenKind = "bos"
    gold, other = None, None
    if episode.gold is not None:
        inside = [i for i, (start, end) in enumerate(offsets) if start < episode.gold[1] and episode.gold[0] < end]
        gold = (inside[0] + len(bos), inside[-1] + 1 + len(bos)) if inside else None
    if episode.other_query_text is not None:
        same_demo, other, _ = _split(tokenizer, episode, episode.other_query_text)
        if same_demo != demo:
            raise DataError(f"sample {episode.sample_id}: other_query_text changes the tokens of demo_text")
    return OnSample(
        episode=episode,
        demo_token_ids=bos + tuple(demo),
        query_token_ids=tuple(query),
        answer_token_id=answer,
        token_kinds=(bos_kind,) * len(bos) + tuple(_kind(offset, episode.char_kinds) for offset in offsets),
        gold_tokens=gold,
        other_query_ids=None if other is None else tuple(other),
    )


def _split(tokenizer: Any, episode: OnEpisode, query_text: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Tokens of the demo, tokens of the query, and the demo tokens' character offsets."""
    cut = len(episode.demo_text)
    encoded = tokenizer(episode.demo_text + query_text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), list(encoded.offset_mapping)
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start < cut < end:
            raise _boundary_error(tokenizer, episode, token)
    n_demo = sum(end <= cut for _, end in offsets)
    demo, query = ids[:n_demo], ids[n_demo:]
    if not demo or not query:
        raise DataError(f"sample {episode.sample_id}: demo_text and query_text must have at least one token each")
    # Offsets may leave out the spaces at a token's ends: then only its text shows that it reaches over the boundary.
    before, after = tokenizer.decode(demo), tokenizer.decode(query)
    if len(after) - len(after.lstrip()) > len(query_text) - len(query_text.lstrip()):
        raise _boundary_error(tokenizer, episode, query[0])
    if len(before) - len(before.rstrip()) > len(episode.demo_text) - len(episode.demo_text.rstrip()):
        raise _boundary_error(tokenizer, episode, demo[-1])
    return demo, query, offsets[:n_demo]


def tokenise_off(tokenizer: Any, sample_id: str, prompt: str) -> OffSample:
    """Tokenise one OFF prompt, as a user's turn of the chat template where the tokenizer has one."""
    bos = leading_bos(tokenizer)
    text = prompt
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, date_string=_CHAT_DATE)
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if bos and ids[:1] != bos:
        ids = bos + ids
    if len(ids) == len(bos):
        raise DataError(f"sample {sample_id}: prompt_text has no token")
    return OffSample(sample_id, text, ids, has_bos=bool(bos))


def single_token_symbols(tokenizer: Any, query_text: str, symbols: Sequence[str]) -> tuple[str, ...]:
    """Those symbols that are one token of their own, with a leading space, after ``query_text``."""
    before = list(tokenizer(query_text, add_special_tokens=False).input_ids)
    usable = []
    for symbol in symbols:
        after = list(tokenizer(f"{query_text} {symbol}", add_special_tokens=False).input_ids)
        if after[:-1] == before:
            usable.append(symbol)
    return tuple(usable)


def _answer_token(tokenizer: Any, episode: OnEpisode, text: str, ids: list[int]) -> int:
    with_answer = list(tokenizer(text + episode.answer_text, add_special_tokens=False).input_ids)
    if with_answer[: len(ids)] != ids:
        raise DataError(
            f"sample {episode.sample_id}: answer_text {episode.answer_text!r} merges with the end of query_text; start "
            "the answer with a space, or end the query differently"
        )
    if len(with_answer) != len(ids) + 1:
        pieces = tokenizer.convert_ids_to_tokens(with_answer[len(ids) :])
        raise DataError(
            f"sample {episode.sample_id}: answer_text {episode.answer_text!r} is {len(pieces)} tokens {pieces}; the "
            "answer must be exactly one token after the query (often it needs a leading space)"
        )
    return int(with_answer[-1])


def _boundary_error(tokenizer: Any, episode: OnEpisode, token: int) -> DataError:
    return DataError(
        f"sample {episode.sample_id}: the boundary between demo_text and query_text falls inside the token "
        f"{tokenizer.convert_ids_to_tokens(token)!r}; move whitespace from one side to the other"
    )


def _kind(offset: tuple[int, int], ranges: tuple[tuple[int, int, TokenKind], ...]) -> TokenKind:
    """The kind of a token: answer if it touches an answer, else input if it touches input, else delimiter."""
    touched = {kind for start, end, kind in ranges if start < offset[1] and offset[0] < end}
    return "answer" if "answer" in touched else "input" if "input" in touched else "delimiter"
