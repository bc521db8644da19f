"""Encode text so that control tokens occur only where a chat template wrote them.

A control token is a special token of the tokenizer (``<|im_end|>``), or another added token that its chat template writes
(Qwen3's ``<think>``). Text of a sample that spells one is plain text: a model would else read the end of a turn in the middle
of a demonstration.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cedkv.core.errors import UnusableSample
from cedkv.core.text import preview
from cedkv.core.values import OnEpisode
from cedkv.tasks.arrival import lost_character, uncovered_letter

Chars = tuple[int, int]
"""Characters of a text, ``[start, end)``."""
Tokens = tuple[list[int], list[Chars]]
"""Token ids, and the characters of each."""
LOST = "character without a token"


@dataclass(frozen=True)
class TextEncoder:
    """Encodes text without special tokens around it.

    control: the added token of each control token's id. pattern: finds control tokens in text.
    """

    tokenizer: Any
    control: dict[int, Any]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any, written: str) -> TextEncoder:
        """Return the encoder of a fast tokenizer; ``written``: its chat template, empty where it has none."""
        control = {
            token_id: token
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        longest_first = sorted((token.content for token in control.values()), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        return cls(tokenizer, control, pattern)

    def encode(self, sample_id: str, text: str, markup: Sequence[Chars] = (), limit: int | None = None) -> Tokens:
        """Return ids and character offsets of a text.

        Args:
            markup: the characters that a chat template wrote; all others are plain.
            limit: how many tokens to return at most; never a part of a character.

        Raises:
            UnusableSample: a character has no token, or the tokenizer reads plain text as a control token.
        """
        ids, offsets = self._joint(text)
        spelled, in_pieces = self._spelled(ids, offsets, text, markup), True
        if spelled is not None:
            # Around markup the text is encoded in pieces, which must be as independent as they are here.
            in_pieces = not markup or self._around(text, [(0, len(text))])[0] == ids
            ids, offsets = self._around(text, markup)
        if limit is not None and len(ids) > limit:
            while limit and offsets[limit][0] < offsets[limit - 1][1]:
                limit -= 1
            ids, offsets = ids[:limit], offsets[:limit]
        if spelled is not None and (not in_pieces or self._spelled(ids, offsets, text, markup) is not None):
            raise UnusableSample(
                "text spells a control token",
                f"sample {sample_id}: its text spells {preview(spelled)}, a control token that this tokenizer cannot read as "
                "plain text; take it out of the text",
            )
        self._check_arrival(sample_id, text, ids, offsets, limit is None or len(ids) < limit)
        return ids, offsets

    def _check_arrival(self, sample_id: str, text: str, ids: list[int], offsets: list[Chars], whole: bool) -> None:
        """Raise UnusableSample if a character of a text, or of the beginning that these tokens are, is in no token."""
        text = text if whole or not offsets else text[: offsets[-1][1]]
        missing = uncovered_letter(text, offsets, whole)
        lost = lost_character(self.tokenizer, text, ids, self.control.keys().isdisjoint(ids), whole)
        if missing is None and lost is None:
            return
        char, read = lost or (str(missing), self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        at = text.find(char)
        raise UnusableSample(
            LOST,
            f"sample {sample_id}: the tokenizer has no token for {char!r} in {text[max(0, at - 20) : at + 20]!r}, of which the "
            f"model would read {preview(read[max(0, at - 20) : at + 25])}; use other characters",
            repr(char),
        )

    def _joint(self, text: str, split: bool = False) -> Tokens:
        """Encode a text at once; ``split``: special tokens that it spells are plain text."""
        # How special tokens are read is a state of the tokenizer, which its next caller must not find changed.
        try:
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=split, verbose=False
            )
        finally:
            self.tokenizer.backend_tokenizer.encode_special_tokens = self.tokenizer.split_special_tokens
        return list(encoded.input_ids), list(encoded.offset_mapping)

    def _is_written(self, token: int, text: str) -> bool:
        """Return whether a text, or what the tokenizer makes of it, has a control token's own characters.

        A token for characters that have none, or for a single byte, may be a special token too.
        """
        content, normalizer = self.control[token].content, self.tokenizer.backend_tokenizer.normalizer
        return content in text or (normalizer is not None and content in normalizer.normalize_str(text))

    def _spelled(self, ids: Sequence[int], offsets: Sequence[Chars], text: str, markup: Sequence[Chars]) -> str | None:
        """Return a control token, as the text has it, that stands in plain text; None where none does."""
        if self.control.keys().isdisjoint(ids):
            return None
        for token, (first, last) in zip(ids, offsets, strict=True):
            found = text[first:last]
            if token not in self.control or not self._is_written(token, found):
                continue
            start, end = last - len(found.lstrip()), first + len(found.rstrip())
            after = bisect_right(markup, (start, len(text)))
            if not after or end > markup[after - 1][1]:
                return found.strip()
        return None

    def _around(self, text: str, ranges: Sequence[Chars]) -> Tokens:
        """Encode a text piece by piece around the control tokens that it spells in these ranges; elsewhere it is plain."""
        ids, offsets, position = list[int](), list[Chars](), 0

        def add(start: int, end: int) -> None:
            if start < end:
                piece, inside = self._joint(text[start:end], split=True)
                ids.extend(piece)
                offsets.extend((start + first, start + last) for first, last in inside)

        by_content = {token.content: (token_id, token) for token_id, token in self.control.items()}
        for match in (match for first, last in ranges for match in self.pattern.finditer(text, first, last)):
            token_id, token = by_content[match.group()]
            start, end = match.span()
            if token.lstrip:
                start = max(position, len(text[:start].rstrip()))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            add(position, start)
            ids.append(token_id)
            offsets.append((start, end))
            position = end
        add(position, len(text))
        return ids, offsets


def query_markup(episode: OnEpisode, query_text: str, start: int) -> list[Chars]:
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
