"""Tokenise samples: demo and query jointly, with every boundary checked.

A demo and its query are tokenised as one text and split by character offsets: tokenising them separately would give other
tokens wherever a merge crosses the boundary. A text that cannot be split is an error that names the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cedkv.core.errors import DataError
from cedkv.core.text import preview
from cedkv.core.values import OffSample, OnEpisode, OnSample, TokenKind

_CHAT_DATE = "01 Jan 2025"
_FIXED_STRFTIME = f"{{% macro strftime_now(format) %}}{_CHAT_DATE}{{% endmacro %}}\n"
"""Some chat templates print today's date, from ``date_string`` or from this function; a prompt must be the same every day."""


def leading_bos(tokenizer: Any) -> tuple[int, ...]:
    """Return ``(bos_token_id,)`` if texts of this model begin with BOS, else ``()``.

    They do if the tokenizer adds BOS in front of a text, or if the chat template adds BOS in front of a conversation: a model
    trained on prompts with BOS gets BOS in every arm. (``bos_token`` as the mark of every turn, as in SmolLM2's template, does
    not count.)

    Raises:
        DataError: the tokenizer adds other tokens in front of a text.
    """
    ids = tokenizer("x", add_special_tokens=False).input_ids
    with_special = tokenizer("x").input_ids
    for start in range(len(with_special) - len(ids) + 1):
        if with_special[start : start + len(ids)] == ids:
            leading = tuple(with_special[:start])
            if leading not in ((), (tokenizer.bos_token_id,)):
                raise DataError(
                    f"the tokenizer starts a text with {tokenizer.convert_ids_to_tokens(leading)}; only a single BOS "
                    "token is supported, because a prefix keeps exactly that token"
                )
            return leading or _template_bos(tokenizer)
    raise DataError("the tokenizer changes a text's own tokens when it adds special tokens; this is not supported")


def _template_bos(tokenizer: Any) -> tuple[int, ...]:
    """Return ``(bos_token_id,)`` if the chat template puts BOS in front of a conversation and nowhere else, else ``()``."""
    if not tokenizer.chat_template or tokenizer.bos_token is None:
        return ()
    text, without_bos = (_render_turn(tokenizer, "the probe", "x", **options) for options in ({}, {"bos_token": ""}))
    return (tokenizer.bos_token_id,) if text == tokenizer.bos_token + without_bos else ()


def tokenize_on(tokenizer: Any, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly, split the tokens at the boundary, and find the single token of the answer.

    Raises:
        DataError: the boundary is inside a token, or the answer is not a single token; the message names the sample.
    """
    bos = leading_bos(tokenizer)
    demo, query, offsets = _split(tokenizer, episode, episode.query_text, bos)
    answer = _answer_token(tokenizer, episode, episode.demo_text + episode.query_text, demo + query)
    bos_kind: TokenKind = "bos"
    other_query = None
    kinds = (bos_kind,) * len(bos) + tuple(_kind(offset, episode.char_kinds) for offset in offsets)
    gold = None if episode.gold is None else _token_range(episode.gold, offsets, len(bos))
    shots = [_token_range(shot, offsets, len(bos)) for shot in episode.shots or ()]
    if episode.other_query_text is not None:
        other_demo, other_query, _ = _split(tokenizer, episode, episode.other_query_text, bos)
        if other_demo != demo:
            raise DataError(f"sample {episode.sample_id}: other_query_text changes the tokens of demo_text")
    return OnSample(
        episode=episode,
        demo_token_ids=bos + tuple(demo),
        query_token_ids=tuple(query),
        answer_token_ids=(answer,),
        token_kinds=kinds,
        gold_tokens=gold,
        other_query_ids=None if other_query is None else tuple(other_query),
        shot_tokens=tuple(shot for shot in shots if shot is not None) or None,
        label_token_ids=_label_tokens(bos + tuple(demo), kinds, answer),
    )


def _label_tokens(demo: tuple[int, ...], kinds: tuple[TokenKind, ...], answer: int) -> tuple[int, ...]:
    """Return the answers that a demo knows and the sample's own, by their first token; empty where fewer than two differ.

    The first tokens of the runs of tokens of kind ``answer``.
    """
    firsts = (i for i, kind in enumerate(kinds) if kind == "answer" and (i == 0 or kinds[i - 1] != "answer"))
    labels = {answer, *(demo[i] for i in firsts)}
    return tuple(sorted(labels)) if len(labels) > 1 else ()


def _token_range(chars: tuple[int, int], offsets: Sequence[tuple[int, int]], shift: int) -> tuple[int, int] | None:
    """Return the tokens that touch a range of characters, counted from ``shift``; None where there are none."""
    touched = [i for i, (start, end) in enumerate(offsets) if start < chars[1] and chars[0] < end]
    return (touched[0] + shift, touched[-1] + 1 + shift) if touched else None


def _split(
    tokenizer: Any, episode: OnEpisode, query_text: str, bos: tuple[int, ...]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Return the demo's tokens, the query's tokens, and the character offsets of the demo's tokens."""
    boundary = len(episode.demo_text)
    ids, offsets = _encode(tokenizer, episode.sample_id, episode.demo_text + query_text)
    if bos and bos[0] in ids:
        raise DataError(
            f"sample {episode.sample_id}: its text holds {tokenizer.bos_token!r}, the token that begins every text of this "
            "model and is added once; leave it out"
        )
    n_demo = sum(end <= boundary for _, end in offsets)
    for i, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if start < boundary < end or (end <= boundary) != (i < n_demo):
            raise _boundary_error(tokenizer, episode, token)
    demo, query = ids[:n_demo], ids[n_demo:]
    if not demo or not query:
        raise DataError(f"sample {episode.sample_id}: demo_text and query_text must have at least one token each")
    if offsets[n_demo - 1][1] == offsets[n_demo][0] == boundary:
        return demo, query, offsets[:n_demo]
    # Offsets may leave out spaces at a token's ends; then only the decoded text shows that a token crosses the boundary. The
    # query's text is what it adds to the demo's text, because decoded alone its first token may lose a space.
    demo_text, text = (tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in (demo, ids))
    added = text[len(demo_text) :]
    if not text.startswith(demo_text) or len(added) - len(added.lstrip()) > len(query_text) - len(query_text.lstrip()):
        raise _boundary_error(tokenizer, episode, query[0])
    if len(demo_text) - len(demo_text.rstrip()) > len(episode.demo_text) - len(episode.demo_text.rstrip()):
        raise _boundary_error(tokenizer, episode, demo[-1])
    return demo, query, offsets[:n_demo]


def _encode(tokenizer: Any, sample_id: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and character offsets of a text, without special tokens. Raises DataError for text that has no token."""
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
    """Tokenise one OFF prompt, rendered as a user turn if the tokenizer has a chat template.

    Raises:
        DataError: the prompt has no token, the template does not render it, or BOS occurs beyond its start; the message names
            the sample.
    """
    text = _render_turn(tokenizer, f"sample {sample_id}", prompt) if tokenizer.chat_template else prompt
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


def _render_turn(tokenizer: Any, subject: str, prompt: str, **options: str) -> str:
    """Render the prompt as a user turn, up to where the model answers. Raises DataError, which names ``subject``."""
    turns = [{"role": "user", "content": prompt}]
    arguments = {"tokenize": False, "add_generation_prompt": True, "date_string": _CHAT_DATE, **options}
    try:
        template = tokenizer.get_chat_template()
        template = _FIXED_STRFTIME + template if "strftime_now" in template else template
        text = str(tokenizer.apply_chat_template(turns, chat_template=template, **arguments))
    except Exception as error:  # a template is a program of the model's authors and may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        if prompt.strip() in text:
            return text
        reason = f"it leaves the prompt out and gives {text[:120]!r}"
    raise DataError(
        f"{subject}: the tokenizer's chat template does not render a single user turn ({reason}); model.chat_template=false "
        "gives OFF prompts as plain text"
    )


def single_token_symbols(tokenizer: Any, query_text: str, symbols: Sequence[str], gap: str = " ") -> tuple[str, ...]:
    """Return the symbols that are a single token after ``query_text`` and ``gap``, which is part of that token."""
    query = list(tokenizer(query_text, add_special_tokens=False).input_ids)
    usable = []
    for symbol in symbols:
        with_symbol = list(tokenizer(f"{query_text}{gap}{symbol}", add_special_tokens=False).input_ids)
        if with_symbol[:-1] == query and with_symbol[-1] != tokenizer.unk_token_id:
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
    """Return the kind of a token: answer if it touches an answer, else input if it touches input, else delimiter."""
    touched = {kind for start, end, kind in ranges if start < offset[1] and offset[0] < end}
    return "answer" if "answer" in touched else "input" if "input" in touched else "delimiter"
