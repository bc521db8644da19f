"""Whether a text arrives at the model: the characters that a tokenizer loses, and the texts that it cannot tell apart.

A character without a token is lost: it vanishes, or becomes the tokenizer's unknown token. What a tokenizer's normaliser
changes (one form of accents, NFC; plain letters for full-width ones, NFKC; no accents, no capitals) is what the model knows. It
is no loss as long as letters and digits remain, an answer keeps its own, and answers and keys of one episode stay apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from cedkv.core.values import OnEpisode
from cedkv.tasks.demo_answers import fold

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def lost_character(tokenizer: Any, text: str, ids: Sequence[int], spaces: bool, whole: bool) -> tuple[str, str] | None:
    """Return the first character of a text that its tokens do not hold, and the text they hold; None where all arrive.

    Args:
        spaces: whether white space must arrive, as one space at least; next to a control token it may not.
        whole: whether these are all tokens of the text; else those of its beginning.
    """
    decoded = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if decoded.strip() == text.strip():
        return None
    normalised = _normalised(tokenizer, text)
    missing = _first_missing(_one_form(normalised), _one_form(decoded), spaces, whole)
    if missing is None:
        missing = _first_missing(_letters(text), _letters(normalised), spaces, whole=True)
    if missing is None:
        return None
    return next((char for char in text if missing in _one_form(char) or missing in _letters(char)), missing), decoded


def uncovered_letter(text: str, offsets: Sequence[tuple[int, int]], whole: bool) -> str | None:
    """Return the first letter or digit of a text that is in none of its tokens; None where each is.

    Args:
        offsets: the characters of each token. whole: as of ``lost_character``.
    """
    position = 0
    for start, end in (*offsets, (len(text), len(text))) if whole else offsets:
        if start > position and not text[position:start].isspace():
            missing = next((char for char in text[position:start] if char.isalnum()), None)
            if missing is not None:
                return missing
        position = max(position, end)
    return None


def keeps_letters(tokenizer: Any, answer: str) -> bool:
    """Return whether a tokenizer reads an answer with its own letters, but for their case and form (NFKC)."""
    return fold(_normalised(tokenizer, answer)) == fold(answer)


def confused(tokenizer: Any, episode: OnEpisode) -> tuple[str, str] | None:
    """Return two texts of an episode that the tokenizer reads as the same one; None where it tells them apart.

    They are two answers, labels included, that differ in more than case, or what two shots ask that differ in their answers.
    """
    demo = episode.demo_text
    whole = demo + episode.query_text + episode.answer_text + "".join(episode.labels or ())
    if _form(_normalised(tokenizer, whole)) == _form(whole):
        return None
    ranges = [(start, end) for start, end, kind in episode.char_kinds if kind == "answer"]
    answers = [episode.answer_text, *(episode.labels or ()), *(demo[start:end] for start, end in ranges)]
    twice = _twice(tokenizer, ((answer, answer.casefold()) for answer in answers))
    return twice or _twice(tokenizer, (_key_and_answer(demo, shot, ranges) for shot in episode.shots or ()))


def _twice(tokenizer: Any, keys: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return two different keys that read the same although what belongs to them differs."""
    read: dict[str, tuple[str, str]] = {}
    for key, answer in keys:
        other, other_answer = read.setdefault(_form(_normalised(tokenizer, key)), (key, answer))
        if _form(other) != _form(key) and _form(other_answer) != _form(answer):
            return other.strip(), key.strip()
    return None


def _key_and_answer(demo: str, shot: tuple[int, int], answers: Sequence[tuple[int, int]]) -> tuple[str, str]:
    """Return the text of a shot without its answers, and its answers."""
    start, end = shot
    inside = [answer for answer in answers if start <= answer[0] and answer[1] <= end]
    edges = [start, *(edge for answer in inside for edge in answer), end]
    key = " ".join(demo[first:last].strip() for first, last in zip(edges[::2], edges[1::2], strict=True))
    return key, " ".join(demo[first:last] for first, last in inside)


def _normalised(tokenizer: Any, text: str) -> str:
    """Return a text as the tokenizer normalises it, spaces as spaces."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text)).replace(_SPACE, " ")


def _form(text: str) -> str:
    """Return a text as it is compared: in one form, white space alike and none around it."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _one_form(text: str) -> str:
    """Return a text in one form, without case, as normalisers and decoders may change it."""
    return unicodedata.normalize("NFC", text.replace(_SPACE, " ").casefold())


def _letters(text: str) -> str:
    """Return the letters and digits of a text without accents, case and width, and the white space between them."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(char for char in plain if char.isalnum() or char.isspace())


def _first_missing(wanted: str, found: str, spaces: bool, whole: bool) -> str | None:
    """Return the first character of a text that another one does not have in its place; that may have more white space,
    and lack what is invisible.

    Args:
        spaces: whether white space must be there, as one space at least.
    """
    at, after_space = 0, True
    for i, char in enumerate(wanted):
        while at < len(found) and found[at].isspace():
            at, after_space = at + 1, True
        if char.isspace():
            if spaces and not after_space and at < len(found) and wanted[i:].strip():
                return char
        elif at < len(found) and found[at] == char:
            at, after_space = at + 1, False
        elif not _is_invisible(char) or next((c for c in wanted[i:] if not _is_invisible(c)), "") != found[at : at + 1]:
            return char if at < len(found) or whole else None
    return None


def _is_invisible(char: str) -> bool:
    return char.isspace() or unicodedata.category(char) in ("Cf", "Cc")
