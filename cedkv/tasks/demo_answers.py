"""Where a demonstration shows answers: found from one episode alone, whatever else its file holds.

A shot of the demonstration ends as the query goes on: what the query ends with, its *cue* (``Symbol:``, ``A:``, ``->``), stands
in front of every answer. Text is compared without its case and in one Unicode form (NFKC), as a reader would.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from cedkv.core.values import TokenKind

Range = tuple[int, int]
"""Characters of a demonstration, ``[start, end)``."""
_LONGER = 30
"""Characters by which an answer may be longer than three times the known ones; text behind a cue that is longer is none."""
_LINE = 10_000
"""Characters of a line that are looked at."""


def fold(text: str) -> str:
    """Return a text as it is compared: without case, in Unicode form NFKC, without white space around it."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).strip()


def guess_kinds(
    demo: str, query: str, answers: Iterable[str], unlisted: bool = False
) -> tuple[tuple[int, int, TokenKind], ...]:
    """Return the kinds of a demo's characters: answers as ``find_answers`` has them; other words are input."""
    kinds: list[tuple[int, int, TokenKind]] = []
    position = 0
    for start, end in [*find_answers(demo, query, answers, unlisted), (len(demo), None)]:
        for piece in re.finditer(r"\w+|\W+", demo[position:start]):
            kind: TokenKind = "input" if piece.group()[0].isalnum() or piece.group()[0] == "_" else "delimiter"
            kinds.append((position + piece.start(), position + piece.end(), kind))
        if end is not None:
            kinds.append((start, end, "answer"))
            position = end
    return tuple(kinds)


def guess_shots(demo: str, kinds: Sequence[tuple[int, int, TokenKind]]) -> tuple[Range, ...] | None:
    """Return the shots of a demo: each ends with an answer and the whitespace after it. None without answers."""
    ends = [end + len(demo[end:]) - len(demo[end:].lstrip()) for _, end, kind in kinds if kind == "answer"]
    edges = sorted({0, *ends})
    return tuple(itertools.pairwise(edges)) or None


def find_answers(demo: str, query: str, answers: Iterable[str], unlisted: bool = False) -> list[Range]:
    """Return where a demo shows answers.

    They are the given ones where they follow the query's cue; where none does, wherever they occur as words of their own.

    Args:
        answers: the known ones: the episode's own, its labels.
        unlisted: whether what follows the cue to the end of its line is an answer too, if it is about as long as those.
    """
    known = sorted({answer.strip() for answer in answers} - {""}, key=lambda answer: (-len(answer), answer))
    found = occurrences(demo, known)
    cue = find_cue(demo, query)
    behind = cue_ends(demo, cue)
    shown = [answer for answer in found if answer[0] in behind]
    if unlisted and known and cue and not cue[-1].isalnum():
        unknown = behind - {start for start, _ in shown}
        shown = [(start, _phrase_end(demo, end, cue)) for start, end in shown]
        longest = 3 * len(known[0]) + _LONGER
        lines = [(start, start + len(_to_the_end(demo, start, cue, known[0]))) for start in unknown]
        shown += [(start, end) for start, end in lines if start < end <= start + longest]
    return sorted(shown) or [answer for answer in found if not _is_article(demo, answer)]


def occurrences(demo: str, answers: Sequence[str]) -> list[Range]:
    """Return where a demo has one of these texts, the first of them where several match, not as a part of another word."""
    if not answers:
        return []
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(fold(text))}(?!\w)" for text in answers if fold(text)) or r"(?!)")
    folded, places = _folded(demo)
    return [(places[match.start()][0], places[match.end() - 1][1]) for match in pattern.finditer(folded)]


def find_cue(demo: str, query: str) -> str:
    """Return what a query ends with, as the demo has it in front of answers; empty where the demo has none of it.

    It is the query's last word with its punctuation (``Symbol:``), if the demo repeats it; of a query that is one line with a
    key in it (``wug:``), the punctuation alone, if every line of the demo has it once.
    """
    chunks = query.split()
    if not chunks:
        return ""
    mark = re.split(r"\w", chunks[-1])[-1]
    times = len(cue_ends(demo, chunks[-1]))
    lines = [line for line in demo.splitlines() if line.strip()]
    is_key = times < 2 and mark not in ("", chunks[-1]) and "\n" not in query.strip()
    if is_key and ((len(chunks) == 1 and mark in demo) or all(line.count(mark) == 1 for line in lines)):
        return mark
    return chunks[-1] if times else ""


def cue_ends(demo: str, cue: str) -> set[int]:
    """Return where answers would begin: after every occurrence of a cue and the white space behind it."""
    word = r"(?<!\w)" if cue[:1].isalnum() else ""
    return {match.end() for match in re.finditer(rf"{word}{re.escape(cue)}\s*", demo)} if cue else set()


def _line_from(demo: str, start: int) -> str:
    return demo[start : start + _LINE].partition("\n")[0]


def _phrase_end(demo: str, end: int, cue: str) -> int:
    """Return where the words end that follow an answer on its line, without punctuation or another shot behind them."""
    rest = _line_from(demo, end)
    more = re.match(r"(?:[ \t]+[\w'-]+){0,5}(?![ \t]*[\w'-])", rest)
    return end if more is None or cue in rest else end + more.end()


def _to_the_end(demo: str, start: int, cue: str, answer: str) -> str:
    """Return what stands from ``start`` to the end of its line; where the line goes on with another shot, to a comma, or
    as many words as the known answer has."""
    text = _line_from(demo, start)
    if cue in text:
        parts = re.split(r"[,;|\t]", text)
        text = parts[0] if len(parts) > 1 else " ".join(text.split(" ")[: len(answer.split())])
    return text.rstrip() if answer[-1:] in ".,;!?" else text.rstrip().rstrip(".,;!?")


def _is_article(demo: str, answer: Range) -> bool:
    """Return whether an answer of one letter is followed by a word, as the article in ``A cat``."""
    text = fold(demo[slice(*answer)])
    return len(text) == 1 and text.isalpha() and re.match(r"[ \t]+\w", demo[answer[1] : answer[1] + 20]) is not None


def _folded(text: str) -> tuple[str, Sequence[Range]]:
    """Return a text as ``fold`` has it, white space kept, and for each of its characters the characters it comes from."""
    if text.isascii():
        return text.lower(), [(i, i + 1) for i in range(len(text))]
    folded, places = list[str](), list[Range]()
    for start, end in _characters(text):
        piece = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[start:end]).casefold())
        folded.append(piece)
        places += [(start, end)] * len(piece)
    return "".join(folded), places


def _characters(text: str) -> Iterator[Range]:
    """Yield the characters of a text as Unicode composes them: a letter with what is written onto it, a Korean syllable."""
    start = 0
    for end in range(1, len(text) + 1):
        joins = end < len(text) and (unicodedata.category(text[end]).startswith("M") or "\u1160" <= text[end] <= "\u11ff")
        if not joins:
            yield start, end
            start = end
