"""The values that flow through the suite, and the legend of shapes.

    B  rows in a batch          T  tokens of a row, padding included     L  demo tokens
    Q  query tokens             K  kept tokens of a selection            V  prefix slots (K kept, the rest null)
    H_q, H_kv  heads            D_h  head dimension                      N  layers

Tokens are counted from 0; spans are half open, ``[start, end)``. Everything here is plain Python or numpy: the pure
parts of the suite (selection, positions, metrics, gates) know no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenKind = Literal["bos", "input", "delimiter", "answer"]
Record = dict[str, Any]


@dataclass(frozen=True)
class OnEpisode:
    """A demonstration with one query about it, as text.

    ``char_kinds`` are ``(start, end, kind)`` over ``demo_text``; characters in no range are delimiters. ``gold`` is the
    part of ``demo_text`` that holds the answer, ``other_query_text`` asks something else of the same demo; both are
    needed by reference points only.
    """

    sample_id: str
    demo_text: str
    query_text: str
    answer_text: str
    char_kinds: tuple[tuple[int, int, TokenKind], ...]
    gold: tuple[int, int] | None = None
    other_query_text: str | None = None


@dataclass(frozen=True)
class OnSample:
    """An episode in tokens. ``demo_token_ids`` begins with BOS (kind ``bos``) where the tokenizer adds one."""

    episode: OnEpisode
    demo_token_ids: tuple[int, ...]
    query_token_ids: tuple[int, ...]
    answer_token_id: int
    token_kinds: tuple[TokenKind, ...]
    gold_tokens: tuple[int, int] | None = None
    other_query_ids: tuple[int, ...] | None = None

    @property
    def sample_id(self) -> str:
        return self.episode.sample_id

    @property
    def has_bos(self) -> bool:
        return self.token_kinds[0] == "bos"

    @property
    def teacher_ids(self) -> tuple[int, ...]:
        return self.demo_token_ids + self.query_token_ids

    @property
    def base_ids(self) -> tuple[int, ...]:
        """The query alone, with BOS where the tokenizer adds one."""
        return self.demo_token_ids[: int(self.has_bos)] + self.query_token_ids


@dataclass(frozen=True)
class OffSample:
    """An unrelated prompt. ``token_ids`` begins with BOS where the tokenizer adds one (``has_bos``)."""

    sample_id: str
    prompt_text: str
    token_ids: tuple[int, ...]
    has_bos: bool

    @property
    def student_ids(self) -> tuple[int, ...]:
        """The prompt as it follows a prefix: BOS, if any, is the prefix's first kept token already."""
        return self.token_ids[int(self.has_bos) :]


@dataclass(frozen=True)
class Span:
    """Demo tokens ``[start, end)`` and the score the selector gave them."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Selection:
    """The spans chosen for one sample; ``kept_tokens`` also holds BOS and sinks, ascending, without repeats."""

    spans: tuple[Span, ...]
    kept_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where kept tokens go: rotary position of each, position of the query's first token, slots of the prefix."""

    kept_tokens: tuple[int, ...]
    key_positions: tuple[int, ...]
    query_start: int
    slots: int


@dataclass(frozen=True)
class Evidence:
    """What the teacher says about one sample's demo.

    ``attention`` (L,) is the attention of the query's last tokens to each demo token, averaged over heads and the
    layers of the selection scope. ``causal_drop`` maps a candidate's start to KL(teacher || teacher without the span)
    in nats. ``accumulated`` (L,) is the attention received from all later tokens, divided by how many there are.
    ``other_attention`` (L,) is ``attention`` when another query is asked. ``gold`` are the demo tokens that hold the
    answer. What no selector asked for is None.
    """

    attention: NDArray[np.float64]
    causal_drop: dict[int, float] | None = None
    accumulated: NDArray[np.float64] | None = None
    other_attention: NDArray[np.float64] | None = None
    gold: tuple[int, int] | None = None


@dataclass(frozen=True)
class Candidate:
    """A span that may be chosen."""

    start: int
    end: int

    def scored_tokens(self) -> range:
        """The tokens a score is averaged over: the demo's very first token is an attention sink and is left out."""
        return range(max(self.start, 1), self.end)
