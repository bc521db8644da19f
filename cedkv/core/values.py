"""The values that modules pass to each other, and the letters of tensor shapes.

    B  rows in a batch          T  tokens of a row, padding included     L  demo tokens
    Q  query tokens             K  kept tokens of a selection            V  prefix slots (K kept, the rest null)
    H_q, H_kv  heads            D_h  head dimension                      N  layers

Tokens are counted from 0; spans are half open, ``[start, end)``. Everything here is plain Python or numpy: selection,
positions, metrics and gates do not depend on torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # numpy takes its time, and a wrong configuration is rejected without it
    import numpy as np
    from numpy.typing import NDArray

TokenKind = Literal["bos", "input", "delimiter", "answer"]
Record = dict[str, Any]


@dataclass(frozen=True)
class OnEpisode:
    """A demonstration with one query about it, as text.

    Attributes:
        char_kinds: ``(start, end, kind)`` over the characters of ``demo_text``; characters in no range are delimiters.
        gold: the characters of ``demo_text`` that hold the answer; needed by ``oracle_span``, and for accuracy by its
            depth.
        other_query_text: another query about the same demo; needed by ``transfer_span`` only.
        shots: the characters of each solved example of ``demo_text``; needed by ``whole_shots`` only.
        labels: the answers to choose among, each as ``answer_text`` would be written; None where answers are of no known
            set.
        markup: the characters of ``demo_text + query_text`` that a chat template wrote: only there does text that spells a
            control token become it.
    """

    sample_id: str
    demo_text: str
    query_text: str
    answer_text: str
    char_kinds: tuple[tuple[int, int, TokenKind], ...]
    gold: tuple[int, int] | None = None
    other_query_text: str | None = None
    shots: tuple[tuple[int, int], ...] | None = None
    labels: tuple[str, ...] | None = None
    markup: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class OnSample:
    """A tokenised episode.

    demo_token_ids: begins with BOS (kind ``bos``) if the tokenizer adds BOS.
    answer_token_ids: the tokens that must be answered, at least one (``data.answer``); none where spans are only selected.
    answer_as_shown: whether the demo has these tokens where it has the answer's text, or does not have it.
    token_kinds: the kind of every demo token.
    gold_tokens, other_query_ids, shot_tokens: ``gold``, ``other_query_text`` and ``shots`` of the episode, in tokens.
    label_token_ids: the answers to choose among, by their first token: ascending, without repeats, the sample's own among them;
        empty where there are no two.
    """

    episode: OnEpisode
    demo_token_ids: tuple[int, ...]
    query_token_ids: tuple[int, ...]
    answer_token_ids: tuple[int, ...]
    token_kinds: tuple[TokenKind, ...]
    gold_tokens: tuple[int, int] | None = None
    other_query_ids: tuple[int, ...] | None = None
    shot_tokens: tuple[tuple[int, int], ...] | None = None
    label_token_ids: tuple[int, ...] = ()
    answer_as_shown: bool = True

    @property
    def answer_token_id(self) -> int:
        """The answer's first token."""
        return self.answer_token_ids[0]

    @property
    def sample_id(self) -> str:
        return self.episode.sample_id

    @property
    def has_bos(self) -> bool:
        return self.token_kinds[0] == "bos"

    @property
    def gold_depth(self) -> float | None:
        """Where the gold tokens start in the demo: their start / L, from 0 to 1; None where the sample does not say."""
        return None if self.gold_tokens is None else self.gold_tokens[0] / len(self.demo_token_ids)

    @property
    def teacher_ids(self) -> tuple[int, ...]:
        return self.demo_token_ids + self.query_token_ids

    @property
    def base_ids(self) -> tuple[int, ...]:
        """The query alone, with BOS if the tokenizer adds BOS."""
        return self.demo_token_ids[: int(self.has_bos)] + self.query_token_ids


@dataclass(frozen=True)
class OffSample:
    """An unrelated prompt, tokenised; ``token_ids`` begins with BOS if the tokenizer adds BOS (``has_bos``)."""

    sample_id: str
    prompt_text: str
    token_ids: tuple[int, ...]
    has_bos: bool

    @property
    def student_ids(self) -> tuple[int, ...]:
        """The prompt as it follows a prefix: without BOS, which is the prefix's first kept token."""
        return self.token_ids[int(self.has_bos) :]


@dataclass(frozen=True)
class Span:
    """Demo tokens ``[start, end)`` and the score the selector gave them."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Selection:
    """The spans chosen for one sample; ``kept_tokens`` also contains BOS and sinks, ascending, without repeats."""

    spans: tuple[Span, ...]
    kept_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where the kept tokens of one sample go.

    Attributes:
        kept_tokens: demo tokens, ascending.
        key_positions: rotary position of each kept token.
        query_start: position of the query's first token.
        slots: slots of the prefix, null slots included.
    """

    kept_tokens: tuple[int, ...]
    key_positions: tuple[int, ...]
    query_start: int
    slots: int


@dataclass(frozen=True)
class Evidence:
    """What a selector may know about one sample's demo; None for evidence that it does not ask for.

    Attributes:
        attention: (L,) attention of the query to each demo token under the configured aggregation (``select.query_window``
            and so on).
        scores: (L,) the score of each demo token that the selector asks for by ``token_score``; ``attention`` for most.
        causal_drop: a candidate's start -> KL(teacher || teacher without the span), in nats.
        span_drop: a candidate's start -> how far hiding the span moves the heads' outputs, in closed form
            (``kv.readings.SpanDrop``).
        gold: the demo tokens that hold the answer.
        shots: the demo's solved examples, ``[start, end)`` in tokens.
        answer_odds: (M, L) bool masks of demo tokens, True = visible -> (M,) log-odds log p / (1 - p) of the teacher's own
            answer.
        divergence: selections -> KL(select || teacher) of each in nats, made and answered as the configuration says.
    """

    attention: NDArray[np.float64]
    scores: NDArray[np.float64] = None  # type: ignore[assignment]  # attention where not given
    causal_drop: dict[int, float] | None = None
    span_drop: dict[int, float] | None = None
    gold: tuple[int, int] | None = None
    shots: tuple[tuple[int, int], ...] | None = None
    answer_odds: Callable[[NDArray[np.bool_]], NDArray[np.float64]] | None = None
    divergence: Callable[[Sequence[Selection]], list[float]] | None = None

    def __post_init__(self) -> None:
        if self.scores is None:
            object.__setattr__(self, "scores", self.attention)


@dataclass(frozen=True)
class Candidate:
    """A span that may be chosen."""

    start: int
    end: int

    def scored_tokens(self) -> range:
        """Return the tokens a score is averaged over; the demo's first token, an attention sink, is left out."""
        return range(max(self.start, 1), self.end)
