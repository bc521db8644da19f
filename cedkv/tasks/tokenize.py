"""Tokenise samples: demo and query jointly, with every boundary checked.

A demo and its query are tokenised as one text and split by character offsets: tokenising them separately would give other
tokens wherever a merge crosses the boundary. A text that cannot be split is an error that names the sample.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cedkv.core.errors import DataError, UnusableSample
from cedkv.core.text import preview
from cedkv.core.values import OffSample, OnEpisode, OnSample, TokenKind
from cedkv.tasks.chat import ChatTemplate, stripped
from cedkv.tasks.control_tokens import TextEncoder, Tokens

AnswerMode = Literal["single", "first", "whole"]
SEVERAL_TOKENS = "answer is several tokens"
_MAX_TOKEN = 256
"""Characters that a token has at most, by far: of a document, no more are tokenised than its first tokens can have."""


@dataclass(frozen=True)
class SampleTokenizer:
    """What tokenising samples needs of a run, made once.

    chat: the chat template; None where there is none. bos: the BOS token in front of every text, or nothing. answer:
    ``data.answer``. off_length: ``data.off_length``.
    """

    tokenizer: Any
    text: TextEncoder
    chat: ChatTemplate | None
    bos: tuple[int, ...]
    answer: AnswerMode
    off_length: int

    @classmethod
    def of(
        cls, tokenizer: Any, template_kwargs: dict[str, Any] | None = None, answer: AnswerMode = "single", off_length: int = 64
    ) -> SampleTokenizer:
        """Return it for a fast tokenizer. Raises DataError: as ``leading_bos``, or the chat template renders no user's turn."""
        chat = ChatTemplate(tokenizer, template_kwargs or {}) if tokenizer.chat_template else None
        encoder = TextEncoder.of(tokenizer, chat.source if chat is not None else "")
        return cls(tokenizer, encoder, chat, leading_bos(tokenizer, chat), answer, off_length)

    def encode(self, sample_id: str, text: str, markup: Sequence[tuple[int, int]] = ()) -> Tokens:
        """Return ids and offsets of a text without the BOS that a chat template puts in front. Raises UnusableSample."""
        ids, offsets = self.text.encode(sample_id, text, markup)
        if self.bos and ids[:1] == list(self.bos):
            ids, offsets = ids[1:], offsets[1:]
        if self.bos and self.bos[0] in ids:
            raise UnusableSample(
                "BOS within the text",
                f"sample {sample_id}: the chat template writes {self.tokenizer.bos_token!r} in the middle of {text[:80]!r}; as "
                "the token that begins every text of this model it must appear once, at the start. Use plain text: "
                "data.format=text for demos, model.chat_template=false for OFF prompts",
            )
        return ids, offsets


def leading_bos(tokenizer: Any, chat: ChatTemplate | None) -> tuple[int, ...]:
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
            return (tokenizer.bos_token_id,) if leading or (chat is not None and chat.writes_bos) else ()
    raise DataError("the tokenizer changes a text's own tokens when it adds special tokens; this is not supported")


def tokenize_on(made: SampleTokenizer, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly, split the tokens at the boundary, and find the tokens of the answer.

    Raises:
        UnusableSample: the boundary is inside a token, the answer is no answer as ``data.answer`` asks for, or the text cannot
            be read; the message names the sample.
    """
    prompt = tokenize_prompt(made, episode)
    answer = _answer_tokens(made, episode, list(prompt.teacher_ids[len(made.bos) :]))
    labels = _label_tokens(made, episode, prompt.demo_token_ids, prompt.token_kinds, answer[0])
    return replace(prompt, answer_token_ids=answer, label_token_ids=labels)


def tokenize_prompt(made: SampleTokenizer, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly and split the tokens at the boundary; the sample has no answer.

    Raises:
        UnusableSample: the boundary is inside a token, or the text cannot be read; the message names the sample.
    """
    bos = made.bos
    demo, query, offsets = _split(made, episode, episode.query_text)
    bos_kind: TokenKind = "bos"
    other_query = None
    kinds = (bos_kind,) * len(bos) + tuple(_kinds(offsets, episode.char_kinds))
    gold = None if episode.gold is None else _token_range(episode.gold, offsets, len(bos))
    shots = [_token_range(shot, offsets, len(bos)) for shot in episode.shots or ()]
    if episode.other_query_text is not None:
        other_demo, other_query, _ = _split(made, episode, episode.other_query_text)
        if other_demo != demo:
            raise UnusableSample(
                "other query changes the demo's tokens",
                f"sample {episode.sample_id}: other_query_text changes the tokens of demo_text",
            )
    return OnSample(
        episode=episode,
        demo_token_ids=bos + tuple(demo),
        query_token_ids=tuple(query),
        answer_token_ids=(),
        token_kinds=kinds,
        gold_tokens=gold,
        other_query_ids=None if other_query is None else tuple(other_query),
        shot_tokens=tuple(shot for shot in shots if shot is not None) or None,
    )


def _label_tokens(
    made: SampleTokenizer, episode: OnEpisode, demo: tuple[int, ...], kinds: tuple[TokenKind, ...], answer: int
) -> tuple[int, ...]:
    """Return the answers to choose among, by their first token; empty where fewer than two differ.

    They are the episode's labels and its own answer. Where it has no labels, they are the answers of its demo, the first tokens
    of the runs of kind ``answer``, if its own is written there: the symbols of an episode.
    """
    shown = {episode.demo_text[start:end].strip() for start, end, kind in episode.char_kinds if kind == "answer"}
    if episode.labels is not None:
        labels = {answer, *_first_tokens(made, episode, episode.labels)}
    elif episode.answer_text.strip() not in shown:
        labels = set()
    else:
        labels = {demo[i] for i, kind in enumerate(kinds) if kind == "answer" and (i == 0 or kinds[i - 1] != "answer")}
    return tuple(sorted(labels)) if answer in labels and len(labels) > 1 else ()


def _first_tokens(made: SampleTokenizer, episode: OnEpisode, labels: Sequence[str]) -> set[int]:
    """Return the first token of each label as it follows the query; none for a label that merges with the query's end."""
    query, found = episode.query_text, set[int]()
    markup = _query_markup(episode, query, 0)
    ids, _ = made.text.encode(episode.sample_id, query, markup)
    for label in labels:
        try:
            with_label, _ = made.text.encode(episode.sample_id, query + label, markup)
        except UnusableSample:
            continue
        if with_label[: len(ids)] == ids and len(with_label) > len(ids):
            found.add(with_label[len(ids)])
    return found


def _query_markup(episode: OnEpisode, query_text: str, start: int) -> list[tuple[int, int]]:
    """Return what a chat template wrote around a query that begins at ``start``: the episode's own, or another one."""
    boundary, end = len(episode.demo_text), len(episode.demo_text) + len(episode.query_text)
    longer = len(query_text) - len(episode.query_text)
    edges = [(first, last) for first, last in episode.markup if first >= boundary]
    shift = start - boundary
    return [
        (first + shift, last + shift) if first == boundary else (first + shift + longer, last + shift + longer)
        for first, last in edges
        if first == boundary or last == end
    ]


def _markup(episode: OnEpisode, query_text: str) -> list[tuple[int, int]]:
    boundary = len(episode.demo_text)
    demo = [(first, last) for first, last in episode.markup if first < boundary]
    return [*demo, *_query_markup(episode, query_text, boundary)]


def _token_range(chars: tuple[int, int], offsets: Sequence[tuple[int, int]], shift: int) -> tuple[int, int] | None:
    """Return the tokens that touch a range of characters, counted from ``shift``; None where there are none."""
    first = bisect_right(offsets, chars[0], key=lambda offset: offset[1])
    last = bisect_left(offsets, chars[1], key=lambda offset: offset[0])
    return (first + shift, last + shift) if first < last else None


def _split(made: SampleTokenizer, episode: OnEpisode, query_text: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Return the demo's tokens, the query's tokens, and the character offsets of the demo's tokens; none of them BOS."""
    tokenizer, boundary = made.tokenizer, len(episode.demo_text)
    ids, offsets = made.encode(episode.sample_id, episode.demo_text + query_text, _markup(episode, query_text))
    n_demo = sum(end <= boundary for _, end in offsets)
    for i, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if start < boundary < end or (end <= boundary) != (i < n_demo):
            raise _boundary_error(tokenizer, episode, token)
    demo, query = ids[:n_demo], ids[n_demo:]
    if not demo or not query:
        raise UnusableSample(
            "no token in demo or query",
            f"sample {episode.sample_id}: demo_text and query_text must have at least one token each",
        )
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


def tokenize_off(made: SampleTokenizer, sample_id: str, prompt: str, document: bool = False) -> OffSample:
    """Tokenise one OFF prompt, rendered as a user's turn if there is a chat template; of a document, its first tokens.

    Raises:
        UnusableSample: the prompt has no token, BOS occurs beyond its start, or the text cannot be read; the message names the
            sample.
        DataError: the chat template does not render a user's turn.
    """
    text, markup = prompt, list[tuple[int, int]]()
    if document:
        ids, offsets = made.text.encode(sample_id, prompt[: made.off_length * _MAX_TOKEN], limit=made.off_length)
        text = prompt[: offsets[-1][1]] if offsets else ""
    else:
        if made.chat is not None:
            before, after, strip = made.chat.user_turn
            inside = stripped(prompt, strip)
            text = before + inside + after
            markup = [(0, len(before)), (len(before) + len(inside), len(text))]
        ids, _ = made.encode(sample_id, text, markup)
    if not ids:
        raise UnusableSample("prompt without a token", f"sample {sample_id}: prompt_text has no token")
    return OffSample(sample_id, text, made.bos + tuple(ids), has_bos=bool(made.bos))


def single_token_symbols(tokenizer: Any, query_text: str, symbols: Sequence[str], gap: str = " ") -> tuple[str, ...]:
    """Return the symbols that are a single token after ``query_text`` and ``gap``, which is part of that token."""
    query = list(tokenizer(query_text, add_special_tokens=False).input_ids)
    usable = []
    for symbol in symbols:
        with_symbol = list(tokenizer(f"{query_text}{gap}{symbol}", add_special_tokens=False).input_ids)
        if with_symbol[:-1] == query and with_symbol[-1] != tokenizer.unk_token_id:
            usable.append(symbol)
    return tuple(usable)


def _answer_tokens(made: SampleTokenizer, episode: OnEpisode, ids: list[int]) -> tuple[int, ...]:
    """Return the tokens that must be answered after demo + query, ``ids``, by ``data.answer``."""
    text = episode.demo_text + episode.query_text + episode.answer_text
    with_answer, _ = made.encode(episode.sample_id, text, episode.markup)
    subject = f"sample {episode.sample_id}: answer_text {preview(episode.answer_text)}"
    if with_answer[: len(ids)] != ids:
        raise UnusableSample(
            "answer merges with the query",
            f"{subject} merges with the end of query_text; start the answer with a space, or end the query differently",
        )
    answer = tuple(with_answer[len(ids) :])
    if not answer or (made.answer == "single" and len(answer) > 1):
        pieces = made.tokenizer.convert_ids_to_tokens(answer)
        wanted = "exactly one token" if made.answer == "single" else "at least one token"
        raise UnusableSample(
            SEVERAL_TOKENS if answer else "answer without a token",
            f"{subject} is {len(pieces)} tokens {preview(pieces, 200)}; the answer must be {wanted} after the query (often it "
            "needs a leading space)",
        )
    return answer[:1] if made.answer == "first" else answer


def _boundary_error(tokenizer: Any, episode: OnEpisode, token: int) -> UnusableSample:
    return UnusableSample(
        "boundary inside a token",
        f"sample {episode.sample_id}: the boundary between demo_text and query_text falls inside the token "
        f"{preview(tokenizer.convert_ids_to_tokens(token))}; move whitespace from one side to the other",
    )


def _kinds(offsets: Sequence[tuple[int, int]], char_kinds: Sequence[tuple[int, int, TokenKind]]) -> Iterator[TokenKind]:
    """Yield the kind of each token: answer if it touches an answer, else input if it touches input, else delimiter."""
    ranges = sorted(char_kinds)
    starts, ends, kinds = ([part[i] for part in ranges] for i in range(3))
    for start, end in offsets:
        touched = kinds[bisect_right(ends, start) : bisect_left(starts, end)]
        yield "answer" if "answer" in touched else "input" if "input" in touched else "delimiter"
