"""The tokens of an answer and of the labels it is one of, and whether the demonstration writes the answer in the same way.

A model answers as the demonstration before it does: where `` red`` is asked for and the demonstration has ``red`` or `` Red``,
which are other tokens, no arm can be right.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from cedkv.core.errors import UnusableSample
from cedkv.core.text import preview
from cedkv.core.values import OnEpisode, TokenKind
from cedkv.tasks.arrival import keeps_letters
from cedkv.tasks.control_tokens import LOST, query_markup
from cedkv.tasks.demo_answers import Range, cue_ends, find_cue, fold

if TYPE_CHECKING:
    from cedkv.tasks.tokenize import SampleTokenizer

SEVERAL_TOKENS = "answer is several tokens"
_UNLIKE = "answer is written otherwise in the demo"


def answer_tokens(made: SampleTokenizer, episode: OnEpisode, ids: list[int]) -> tuple[tuple[int, ...], bool]:
    """Return the tokens that must be answered after demo + query, and whether the demo has them if it has their text.

    Args:
        ids: the tokens of demo + query, without BOS.

    Raises:
        UnusableSample: the answer is no answer as ``data.answer`` asks for, or the shots of the demo write it otherwise.
    """
    demo, query, own = episode.demo_text, episode.query_text, episode.answer_text
    subject = f"sample {episode.sample_id}: answer_text {preview(own)}"
    wanted = "exactly one token" if made.answer == "single" else "at least one token"
    if not own.strip():
        raise UnusableSample(
            "answer without a token", f"{subject} is 0 tokens [] of text; the answer must be {wanted} after the query"
        )
    if not keeps_letters(made.tokenizer, own):
        raise UnusableSample(
            LOST,
            f"{subject} loses letters or accents in this tokenizer, and another answer would be taken for it; write it as the "
            "tokenizer reads it",
            preview(own),
        )
    shown, behind = _shown(episode), cue_ends(demo, find_cue(demo, query))
    in_shots = [answer for answer in shown if answer[0] in behind]
    _check_spacing(episode, in_shots)
    with_answer, offsets = made.encode(episode.sample_id, demo + query + own, episode.markup)
    if with_answer[: len(ids)] != ids:
        message = f"{subject} merges with the end of query_text; {_apart(episode)}"
        raise UnusableSample("answer merges with the query", message, preview(own))
    answer = tuple(with_answer[len(ids) :])
    if not answer or (made.answer == "single" and len(answer) > 1):
        pieces = made.tokenizer.convert_ids_to_tokens(answer)
        spaced = own[0].isspace() or query[-1].isspace() or in_shots
        raise UnusableSample(
            SEVERAL_TOKENS if answer else "answer without a token",
            f"{subject} is {len(pieces)} tokens {preview(pieces, 200)}; the answer must be {wanted} after the query"
            + ("" if spaced else " (often it needs a leading space)"),
            preview(own),
        )
    answer = answer[:1] if made.answer == "first" else answer
    text = demo + query + own
    blank = len(list(takewhile(lambda offset: not text[slice(*offset)].strip(), offsets[len(ids) : len(ids) + len(answer)])))
    places = [answer for answer in shown if fold(demo[slice(*answer)]) == fold(own)]
    written = {place: _tokens_at(place[0], with_answer, offsets, len(answer) - blank) for place in places}
    if len(answer) <= blank or not written or answer[blank:] in written.values():
        return answer, True
    if behind.isdisjoint(start for start, _ in places):
        return answer, False
    raise _unlike(made, episode, subject, answer[blank:], [(at, ids) for at, ids in written.items() if at[0] in behind][-1])


def _tokens_at(start: int, ids: Sequence[int], offsets: Sequence[Range], n: int) -> tuple[int, ...]:
    """Return the first tokens of a text that begins at a character."""
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    return tuple(ids[first : first + n])


def _unlike(
    made: SampleTokenizer,
    episode: OnEpisode,
    subject: str,
    wanted: tuple[int, ...],
    shown: tuple[Range, tuple[int, ...]],
) -> UnusableSample:
    """Return the error for an answer that a shot of the demo writes with other tokens."""
    (start, end), written = shown
    demo, query = episode.demo_text, episode.query_text
    there = demo[len(demo[:start].rstrip()) : end]
    own = (query[len(query.rstrip()) :] + episode.answer_text).rstrip()
    same_letters = there != own and unicodedata.normalize("NFC", there) == unicodedata.normalize("NFC", own)
    as_there = (ascii if same_letters else preview)(there)
    remedy = (
        "put a line break behind the demo's answers, or another mark that forms no token with them"
        if there == own
        else f"write answer_text as {as_there}, or the demo's answers as this one"
    )
    wanted_text, written_text = (preview(made.tokenizer.convert_ids_to_tokens(list(some))) for some in (wanted, written))
    return UnusableSample(
        _UNLIKE,
        f"{subject} is {wanted_text}, but the demo has {as_there}, {written_text}, after the same words: an arm that "
        f"answers as the demo does would count as wrong; {remedy}",
        preview(episode.answer_text),
    )


def _shown(episode: OnEpisode) -> list[Range]:
    """Return the answers of a demo without the white space around them."""
    demo, shown = episode.demo_text, []
    for start, end, kind in episode.char_kinds:
        text = demo[start:end]
        if kind == "answer" and text.strip():
            shown.append((start + len(text) - len(text.lstrip()), start + len(text.rstrip())))
    return shown


def _check_spacing(episode: OnEpisode, in_shots: Sequence[Range]) -> None:
    """Raise UnusableSample if answer or labels have other white space in front of them than the answers in the demo's shots."""
    demo, query = episode.demo_text, episode.query_text
    gaps = Counter(demo[len(demo[:start].rstrip()) : start] for start, _ in in_shots)
    at_end = query[len(query.rstrip()) :]
    for name, answer in [("answer_text", episode.answer_text), *(("label", label) for label in episode.labels or ())]:
        own = at_end + answer[: len(answer) - len(answer.lstrip())]
        if not gaps or own in gaps or not answer.strip():
            continue
        gap = gaps.most_common(1)[0][0]
        keep = "" if at_end.strip(" ") == "" or not gap.startswith(at_end) else at_end
        ending = "" if keep == at_end else "query_text without the white space at its end, and "
        raise UnusableSample(
            _UNLIKE,
            f"sample {episode.sample_id}: {name} {preview(answer)} follows query_text after {preview(own)}, where the demo's "
            f"answers follow after {preview(gap)}, as other tokens; write {ending}{name} as "
            f"{preview(gap[len(keep) :] + answer.strip())}",
            preview(answer),
        )


def _apart(episode: OnEpisode) -> str:
    """Return what keeps an answer apart from the query that it merges with."""
    query, answer = episode.query_text, episode.answer_text
    space = query[len(query.rstrip(" ")) :]
    if space and not answer[:1].isspace():
        return f"move the space from the end of query_text to the start of answer_text, {preview(space + answer)}"
    if answer[:1].isspace() or query[-1:].isspace():
        return "end the query differently"
    return "start the answer with a space, or end the query differently"


def label_tokens(
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
    markup = query_markup(episode, query, 0)
    ids, _ = made.text.encode(episode.sample_id, query, markup)
    for label in labels:
        try:
            with_label, _ = made.text.encode(episode.sample_id, query + label, markup)
        except UnusableSample:
            continue
        if with_label[: len(ids)] == ids and len(with_label) > len(ids):
            found.add(with_label[len(ids)])
    return found
