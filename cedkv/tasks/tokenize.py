"""From text to tokens, once, jointly, with every boundary checked.

A demonstration and its query are tokenised as one text and split by character offsets: tokenising them apart would give
other tokens wherever a merge crosses the boundary. What cannot be split is an error that names the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cedkv.core.errors import DataError
from cedkv.core.text import preview
from cedkv.core.values import OffSample, OnEpisode, OnSample, TokenKind

_CHAT_DATE = "01 Jan 2025"
_CHAT_NOW = f"{{% macro strftime_now(format) %}}{_CHAT_DATE}{{% endmacro %}}\n"
"""Some chat templates print today's date, unless told one or by this function; a prompt must be the same tomorrow."""


def leading_bos(tokenizer: Any) -> tuple[int, ...]:
    """``(bos_token_id,)`` where a text of this model begins with BOS, else ``()``.

    It does where the tokenizer puts one in front of a text, or where its chat template puts one in front of a conversation:
    a model that has learned prompts with BOS gets it in every arm. (``bos_token`` as a mark of each turn, as in SmolLM2's
    template, is none.)

    Raises:
        DataError: something else is put there.
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
            return leading or _bos_of_template(tokenizer)
    raise DataError("the tokenizer changes a text's own tokens when it adds special tokens; this is not supported")


def _bos_of_template(tokenizer: Any) -> tuple[int, ...]:
    if not tokenizer.chat_template or tokenizer.bos_token is None:
        return ()
    text, without = (_as_turn(tokenizer, "the probe", "x", **over) for over in ({}, {"bos_token": ""}))
    return (tokenizer.bos_token_id,) if text == tokenizer.bos_token + without else ()


def tokenize_on(tokenizer: Any, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly, split at the boundary, and find the answer's one token.

    Raises:
        DataError: a boundary inside a token, or an answer that is not one token; the message names the sample.
    """
    bos = leading_bos(tokenizer)
    demo, query, offsets = _split(tokenizer, episode, episode.query_text, bos)
    answer = _answer_token(tokenizer, episode, episode.demo_text + episode.query_text, demo + query)
    bos_kind: TokenKind = "bos"
    gold, other = None, None
    if episode.gold is not None:
        inside = [i for i, (start, end) in enumerate(offsets) if start < episode.gold[1] and episode.gold[0] < end]
        gold = (inside[0] + len(bos), inside[-1] + 1 + len(bos)) if inside else None
    if episode.other_query_text is not None:
        same_demo, other, _ = _split(tokenizer, episode, episode.other_query_text, bos)
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


def _split(
    tokenizer: Any, episode: OnEpisode, query_text: str, bos: tuple[int, ...]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Tokens of the demo, tokens of the query, and the demo tokens' character offsets."""
    cut = len(episode.demo_text)
    ids, offsets = _encode(tokenizer, episode.sample_id, episode.demo_text + query_text)
    if bos and bos[0] in ids:
        raise DataError(
            f"sample {episode.sample_id}: its text holds {tokenizer.bos_token!r}, the token that begins every text of this "
            "model and is put there once; leave it out"
        )
    n_demo = sum(end <= cut for _, end in offsets)
    for i, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if start < cut < end or (end <= cut) != (i < n_demo):
            raise _boundary_error(tokenizer, episode, token)
    demo, query = ids[:n_demo], ids[n_demo:]
    if not demo or not query:
        raise DataError(f"sample {episode.sample_id}: demo_text and query_text must have at least one token each")
    if offsets[n_demo - 1][1] == offsets[n_demo][0] == cut:
        return demo, query, offsets[:n_demo]
    # Offsets may leave out the spaces at a token's ends: then only its text shows that it reaches over the boundary. The
    # query's text is what it adds to the demo's: alone, its first token may lose a space.
    before, both = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (demo, ids))
    after = both[len(before) :]
    if not both.startswith(before) or len(after) - len(after.lstrip()) > len(query_text) - len(query_text.lstrip()):
        raise _boundary_error(tokenizer, episode, query[0])
    if len(before) - len(before.rstrip()) > len(episode.demo_text) - len(episode.demo_text.rstrip()):
        raise _boundary_error(tokenizer, episode, demo[-1])
    return demo, query, offsets[:n_demo]


def _encode(tokenizer: Any, sample_id: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets of a text, without special tokens. Raises DataError for text that no token stands for."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), list(encoded.offset_mapping)
    for token, (start, end) in zip(ids, offsets, strict=True):
        if token == tokenizer.unk_token_id and text[start:end] != tokenizer.unk_token:
            raise DataError(
                f"sample {sample_id}: the tokenizer has no token for {text[start:end]!r}, the model would read "
                f"{tokenizer.unk_token!r} in its place; use other characters"
            )
    return ids, offsets


def tokenize_off(tokenizer: Any, sample_id: str, prompt: str) -> OffSample:
    """Tokenise one OFF prompt, as a user's turn of the chat template where the tokenizer has one.

    Raises:
        DataError: nothing to tokenise, a template that does not render it, or BOS inside; the message names the sample.
    """
    text = _as_turn(tokenizer, f"sample {sample_id}", prompt) if tokenizer.chat_template else prompt
    bos = leading_bos(tokenizer)
    ids = tuple(_encode(tokenizer, sample_id, text)[0])
    if bos and ids[:1] != bos:
        ids = bos + ids
    if len(ids) == len(bos):
        raise DataError(f"sample {sample_id}: prompt_text has no token")
    if bos and bos[0] in ids[1:]:
        raise DataError(
            f"sample {sample_id}: {tokenizer.bos_token!r} appears {ids.count(bos[0])} times in the prompt {text[:80]!r}; as "
            "the token that begins every text of this model it must appear once, at the start. Leave it out of prompt_text, or "
            "set model.chat_template=false if the tokenizer's chat template writes it"
        )
    return OffSample(sample_id, text, ids, has_bos=bool(bos))


def _as_turn(tokenizer: Any, who: str, prompt: str, **over: str) -> str:
    """The prompt as a user's turn, up to where the model answers. Raises DataError, beginning with ``who``."""
    turns = [{"role": "user", "content": prompt}]
    fixed = {"tokenize": False, "add_generation_prompt": True, "date_string": _CHAT_DATE, **over}
    try:
        template = tokenizer.get_chat_template()
        template = _CHAT_NOW + template if "strftime_now" in template else template
        text = str(tokenizer.apply_chat_template(turns, chat_template=template, **fixed))
    except Exception as error:  # a template is the model's own program, and may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        if prompt.strip() in text:
            return text
        reason = f"it leaves the prompt out and gives {text[:120]!r}"
    raise DataError(
        f"{who}: the tokenizer's chat template does not render a single user turn ({reason}); model.chat_template=false "
        "gives OFF prompts as plain text"
    )


def single_token_symbols(tokenizer: Any, query_text: str, symbols: Sequence[str]) -> tuple[str, ...]:
    """Those symbols that are one token of their own, with a leading space, after ``query_text``."""
    before = list(tokenizer(query_text, add_special_tokens=False).input_ids)
    usable = []
    for symbol in symbols:
        after = list(tokenizer(f"{query_text} {symbol}", add_special_tokens=False).input_ids)
        if after[:-1] == before and after[-1] != tokenizer.unk_token_id:
            usable.append(symbol)
    return tuple(usable)


def _answer_token(tokenizer: Any, episode: OnEpisode, text: str, ids: list[int]) -> int:
    with_answer, _ = _encode(tokenizer, episode.sample_id, text + episode.answer_text)
    if with_answer[: len(ids)] != ids:
        raise DataError(
            f"sample {episode.sample_id}: answer_text {preview(episode.answer_text)} merges with the end of query_text; start "
            "the answer with a space, or end the query differently"
        )
    if len(with_answer) != len(ids) + 1:
        pieces = tokenizer.convert_ids_to_tokens(with_answer[len(ids) :])
        raise DataError(
            f"sample {episode.sample_id}: answer_text {preview(episode.answer_text)} is {len(pieces)} tokens "
            f"{preview(pieces, 200)}; the answer must be exactly one token after the query (often it needs a leading space)"
        )
    return int(with_answer[-1])


def _boundary_error(tokenizer: Any, episode: OnEpisode, token: int) -> DataError:
    return DataError(
        f"sample {episode.sample_id}: the boundary between demo_text and query_text falls inside the token "
        f"{preview(tokenizer.convert_ids_to_tokens(token))}; move whitespace from one side to the other"
    )


def _kind(offset: tuple[int, int], ranges: tuple[tuple[int, int, TokenKind], ...]) -> TokenKind:
    """The kind of a token: answer if it touches an answer, else input if it touches input, else delimiter."""
    touched = {kind for start, end, kind in ranges if start < offset[1] and offset[0] < end}
    return "answer" if "answer" in touched else "input" if "input" in touched else "delimiter"
