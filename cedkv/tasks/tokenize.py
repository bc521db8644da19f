"""Tokenise samples: demo and query jointly, with every boundary checked.

A demo and its query are tokenised as one text and split by character offsets: tokenising them separately would give other
tokens wherever a merge crosses the boundary. A text that cannot be split is an error that names the sample.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cedkv.core.errors import DataError, UnusableSample
from cedkv.core.text import preview
from cedkv.core.values import OffSample, OnEpisode, OnSample, TokenKind
from cedkv.tasks.answer_tokens import answer_tokens, label_tokens
from cedkv.tasks.arrival import confused
from cedkv.tasks.bos import BosSource, leading_bos
from cedkv.tasks.chat import ChatTemplate, stripped
from cedkv.tasks.control_tokens import TextEncoder, Tokens, query_markup

AnswerMode = Literal["single", "first", "whole"]
BLANK = "prompt without a token"
_MAX_TOKEN = 256
"""Characters that a token has at most, by far: of a document, no more are tokenised than its first tokens can have."""


@dataclass(frozen=True)
class SampleTokenizer:
    """What tokenising samples needs of a run, made once.

    chat: the chat template; None where there is none. bos: the BOS token in front of every text, or nothing. bos_by: who puts
    it there. answer: ``data.answer``. off_length: ``data.off_length``.
    """

    tokenizer: Any
    text: TextEncoder
    chat: ChatTemplate | None
    bos: tuple[int, ...]
    bos_by: BosSource | None
    answer: AnswerMode
    off_length: int

    @classmethod
    def of(
        cls, tokenizer: Any, template_kwargs: dict[str, Any] | None = None, answer: AnswerMode = "single", off_length: int = 64
    ) -> SampleTokenizer:
        """Return it for a fast tokenizer.

        Raises:
            DataError: as ``leading_bos``; the chat template renders no user's turn; the tokenizer cuts a text at random.
        """
        dropout = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
        if dropout:
            raise DataError(
                f"the tokenizer has a BPE dropout of {dropout:.3g}: it cuts the same text into other tokens every time, which "
                'is for training; write "dropout": null in the model\'s tokenizer.json'
            )
        chat = ChatTemplate(tokenizer, template_kwargs or {}) if tokenizer.chat_template else None
        encoder = TextEncoder.of(tokenizer, chat.source if chat is not None else "")
        return cls(tokenizer, encoder, chat, *leading_bos(tokenizer, encoder, chat), answer, off_length)

    @property
    def bos_text(self) -> str:
        """How BOS is written; empty where there is none."""
        return "".join(self.tokenizer.convert_ids_to_tokens(list(self.bos)))

    def encode(self, sample_id: str, text: str, markup: Sequence[tuple[int, int]] = ()) -> Tokens:
        """Return ids and offsets of a text without the BOS that a chat template puts in front. Raises UnusableSample."""
        ids, offsets = self.text.encode(sample_id, text, markup)
        if self.bos and ids[:1] == list(self.bos):
            ids, offsets = ids[1:], offsets[1:]
        if self.bos and self.bos[0] in ids:
            raise UnusableSample(
                "BOS within the text",
                f"sample {sample_id}: the chat template writes {self.bos_text!r} in the middle of {text[:80]!r}; as "
                "the token that begins every text of this model it must appear once, at the start. Use plain text: "
                "data.format=text for demos, model.chat_template=false for OFF prompts",
            )
        return ids, offsets


def bos_put_by(tokenizer: Any, template_kwargs: dict[str, Any]) -> str:
    """Return who puts BOS in front of texts: tokenizer, chat template, or no one; unknown where no text can be tokenised."""
    try:
        return SampleTokenizer.of(tokenizer, template_kwargs).bos_by or "no one"
    except DataError:
        return "unknown"


def tokenize_on(made: SampleTokenizer, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly, split the tokens at the boundary, and find the tokens of the answer.

    Raises:
        UnusableSample: as ``tokenize_prompt`` and ``answer_tokens``.
    """
    prompt = tokenize_prompt(made, episode)
    answer, as_shown = answer_tokens(made, episode, list(prompt.teacher_ids[len(made.bos) :]))
    labels = label_tokens(made, episode, prompt.demo_token_ids, prompt.token_kinds, answer[0])
    return replace(prompt, answer_token_ids=answer, answer_as_shown=as_shown, label_token_ids=labels)


def tokenize_prompt(made: SampleTokenizer, episode: OnEpisode) -> OnSample:
    """Tokenise demo + query jointly and split the tokens at the boundary; the sample has no answer.

    Raises:
        UnusableSample: the boundary is inside a token, the query is blank, the text cannot be read, or the tokenizer reads two
            of its answers or keys as the same; the message names the sample.
    """
    bos = made.bos
    if not episode.query_text.strip():
        raise UnusableSample(
            "no token in demo or query",
            f"sample {episode.sample_id}: demo_text and query_text must have at least one token each, and query_text is blank",
        )
    alike = confused(made.tokenizer, episode)
    if alike is not None:
        raise UnusableSample(
            "texts that the tokenizer reads as the same",
            f"sample {episode.sample_id}: the tokenizer reads {preview(alike[0])} and {preview(alike[1])} as the same text: no "
            "model could tell them apart; write one of them differently",
            " = ".join(map(preview, alike)),
        )
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


def _token_range(chars: tuple[int, int], offsets: Sequence[tuple[int, int]], shift: int) -> tuple[int, int] | None:
    """Return the tokens that touch a range of characters, counted from ``shift``; None where there are none."""
    first = bisect_right(offsets, chars[0], key=lambda offset: offset[1])
    last = bisect_left(offsets, chars[1], key=lambda offset: offset[0])
    return (first + shift, last + shift) if first < last else None


def _split(made: SampleTokenizer, episode: OnEpisode, query_text: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Return the demo's tokens, the query's tokens, and the character offsets of the demo's tokens; none of them BOS."""
    tokenizer, boundary = made.tokenizer, len(episode.demo_text)
    markup = [(first, last) for first, last in episode.markup if first < boundary]
    markup += query_markup(episode, query_text, boundary)
    ids, offsets = made.encode(episode.sample_id, episode.demo_text + query_text, markup)
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
        UnusableSample: the prompt is blank, BOS occurs beyond its start, or the text cannot be read; the message names the
            sample.
        DataError: the chat template does not render a user's turn.
    """
    if not prompt.strip():
        raise UnusableSample(BLANK, f"sample {sample_id}: prompt_text has no token that stands for text; write a prompt")
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
        raise UnusableSample(BLANK, f"sample {sample_id}: prompt_text has no token")
    return OffSample(sample_id, text, made.bos + tuple(ids), has_bos=bool(made.bos))


def single_token_symbols(tokenizer: Any, query_text: str, symbols: Sequence[str], gap: str = " ") -> tuple[str, ...]:
    """Return the symbols that are a single token of their own after ``query_text`` and ``gap``, which is part of that token."""
    query = list(tokenizer(query_text, add_special_tokens=False).input_ids)
    last: dict[str, int] = {}
    for symbol in symbols:
        with_symbol = list(tokenizer(f"{query_text}{gap}{symbol}", add_special_tokens=False).input_ids)
        if with_symbol[:-1] == query and with_symbol[-1] != tokenizer.unk_token_id:
            last[symbol] = with_symbol[-1]
    times = Counter(last.values())
    return tuple(symbol for symbol, token in last.items() if times[token] == 1)


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
