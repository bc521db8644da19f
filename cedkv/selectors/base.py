"""What selectors share: their base class, the candidates of a demo, the score of a span, the greedy choice under a distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config, SelectBlock
from cedkv.core.errors import ConfigError
from cedkv.core.registry import build
from cedkv.core.text import near_match, preview
from cedkv.core.values import Candidate, Evidence, Selection, Span, TokenKind
from cedkv.kv.readings import QueryAttention, RowAttention, TokenScore

Role = Literal["candidate", "reference", "oracle"]
ALWAYS = frozenset({"attention", "scores"})
"""Fields of ``Evidence`` that every selector is given."""


@dataclass(frozen=True)
class SelectionTask:
    """All that a selector may look at, for one sample.

    Attributes:
        select: the settings that all selectors share (span length, budget, distance, center policy).
        token_kinds: (L,) kind of each demo token.
        evidence: what the teacher says about the demo; of the optional fields those that the selector ``needs``.
        rng: belongs to this (sample, trial); a selector that draws nothing leaves it alone.
    """

    select: SelectBlock
    token_kinds: tuple[TokenKind, ...]
    evidence: Evidence
    rng: np.random.Generator


@dataclass(frozen=True)
class Selector(ABC):
    """Chooses spans. A subclass is a frozen dataclass; its fields are its parameters, set by ``select.params``.

    Attributes:
        needs: fields of ``Evidence`` beyond attention and scores; what no condition of a run needs is not computed.
        role: ``candidate``; ``reference``, compared with, never the winner; or ``oracle``, a reference that knows the answer.
        query_aware: the choice depends on the query.
        bounded: keeps no more than ``span_budget x span_len`` tokens; else it may exceed ``prefix_len`` too.
        uses_partner: the prefix goes in front of another sample's query.

    Raises:
        TypeError: a subclass sets a class variable that is none of these, or one to an impossible value.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    role: ClassVar[Role] = "candidate"
    query_aware: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    uses_partner: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = {"needs", "role", "query_aware", "bounded", "uses_partner"}
        for name, value in vars(cls).items():
            is_setting = not name.startswith("_") and not callable(value) and not isinstance(value, property | classmethod)
            if is_setting and name not in known and name not in cls.__annotations__:
                raise TypeError(f"{cls.__name__}.{name} is no class variable of a selector{near_match(name, known)}")
        evidence = {field.name for field in fields(Evidence)} - ALWAYS
        if not cls.needs <= evidence:
            unknown = sorted(cls.needs - evidence)
            raise TypeError(f"{cls.__name__}.needs: {unknown} is no evidence{near_match(unknown[0], evidence)}")
        if cls.role not in get_args(Role):
            raise TypeError(f"{cls.__name__}.role = {cls.role!r}: it is one of {', '.join(get_args(Role))}")

    def token_score(self, configured: TokenScore) -> TokenScore:
        """Return the score of demo tokens that becomes ``Evidence.scores``.

        Args:
            configured: the aggregation of the query's attention that the configuration asks for, which is the default.
        """
        return configured

    @abstractmethod
    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the chosen spans, at least one, in any order, each ``[start, end)`` inside the demo and after BOS."""

    def rows_at_most(self, n_candidates: int, select: SelectBlock) -> int:
        """Return how many masks or selections the choice asks ``answer_odds`` or ``divergence`` for at most, per sample."""
        return 0

    def worth(self, task: SelectionTask) -> NDArray[np.float64] | None:
        """Return what the selector holds each demo token to be worth, (L,): the score that is judged (coverage, LDS).

        None where it ranks no tokens: it draws them, or takes them by their place.
        """
        return None


def query_kind(cls: type[Selector]) -> Literal["query-aware", "query-agnostic"]:
    """Return whether a selector's choice depends on the query, in the words of tables and tags."""
    return "query-aware" if cls.query_aware else "query-agnostic"


def selector_class(name: str) -> type[Selector]:
    """Return the class registered under a name. Raises ConfigError as ``Registry.get``."""
    cls: type[Selector] = SELECTORS.get(name)
    return cls


def create(select: SelectBlock) -> Selector:
    """Return the configured selector with its parameters. Raises ConfigError for parameters it does not take."""
    return build(selector_class(select.mode), select.params, "select.params")


def needed_of_episode(config: Phase2Config) -> frozenset[str]:
    """Return what a configuration's selector needs of an episode: of ``gold``, ``shots`` and ``other_query_text``."""
    selector = create(config.select)
    other = getattr(selector.token_score(configured_score(config)).reading, "query", "own") == "other"
    return selector.needs & {"gold", "shots"} | ({"other_query_text"} if other else frozenset())


def query_window(select: SelectBlock) -> int | None:
    """Return how many of the query's last tokens are read; None for all."""
    return None if select.query_window == "all" else select.query_window


def configured_score(config: Phase2Config) -> TokenScore:
    """Return the aggregation of the query's attention that a configuration asks for."""
    select, scope = config.select, config.layer_scope.selection
    rows = RowAttention(query_window(select), select.row_pooling)
    return TokenScore(
        reading=QueryAttention(rows, select.value_weighting == "output_norm", select.null_query),
        heads=select.head_pooling,
        layers=select.layer_pooling,
        kernel=select.pooling_kernel,
        scope=scope if isinstance(scope, str) else tuple(scope),
    )


def select_tokens(selector: Selector, task: SelectionTask) -> Selection:
    """Choose spans, and add what every selector keeps: BOS and the first ``keep_sink`` tokens after it.

    The selector sees the evidence that it declares in ``needs`` and no other, whatever was computed for others.

    Raises:
        ConfigError: a span outside the demo or over BOS, or more tokens than the budget of a bounded selector.
    """
    spans = tuple(sorted(selector.choose(only_needed(selector, task)), key=lambda span: span.start))
    first = int(task.token_kinds[0] == "bos")
    _check_spans(selector, spans, task.select, first, len(task.token_kinds))
    return Selection(spans, kept_tokens(spans, task.token_kinds, task.select))


def token_worth(selector: Selector, task: SelectionTask) -> NDArray[np.float64] | None:
    """Return what a selector holds each demo token to be worth (``Selector.worth``), (L,), from the evidence that it declares.

    Raises:
        ConfigError: it is not one finite score per demo token.
    """
    worth = selector.worth(only_needed(selector, task))
    if worth is not None and (worth.shape != (len(task.token_kinds),) or not np.isfinite(worth).all()):
        raise ConfigError(
            f"{type(selector).__name__}.worth returned {preview(worth)} of shape {list(worth.shape)} for a demo of "
            f"{len(task.token_kinds)} tokens: scores are judged by token; return one finite number for each"
        )
    return worth


def kept_tokens(spans: Iterable[Span], token_kinds: tuple[TokenKind, ...], select: SelectBlock) -> tuple[int, ...]:
    """Return the tokens of spans with what every selector keeps: BOS and the first ``keep_sink`` tokens after it."""
    kept = set(range(min(int(token_kinds[0] == "bos") + select.keep_sink, len(token_kinds))))
    for span in spans:
        kept.update(range(span.start, span.end))
    return tuple(sorted(kept))


def only_needed(selector: Selector, task: SelectionTask) -> SelectionTask:
    """Return the task without the evidence that the selector does not declare in ``needs``."""
    hidden: dict[str, Any] = dict.fromkeys({field.name for field in fields(Evidence)} - ALWAYS - selector.needs)
    return replace(task, evidence=replace(task.evidence, **hidden))


def _check_spans(selector: Selector, spans: tuple[Span, ...], select: SelectBlock, first: int, length: int) -> None:
    name = type(selector).__name__
    for span in spans:
        if not first <= span.start < span.end <= length:
            raise ConfigError(
                f"{name} chose the span [{span.start}, {span.end}) of a demo whose tokens are [{first}, {length}): the prefix "
                "would hold other tokens; a span lies inside the demo, after BOS"
            )
    chosen = {token for span in spans for token in range(span.start, span.end)}
    budget = select.span_budget * select.span_len
    if selector.bounded and len(chosen) > budget:
        raise ConfigError(
            f"{name} chose {len(chosen)} tokens, the budget is span_budget x span_len = {budget}: it would be compared with "
            "selectors that keep fewer; choose fewer, or declare bounded = False"
        )


def candidates(token_kinds: tuple[TokenKind, ...], select: SelectBlock) -> list[Candidate]:
    """Return the spans inside the demo whose start (or center) is an input or delimiter token, by ascending start."""
    spans = []
    for start in range(len(token_kinds) - select.span_len + 1):
        anchor = start if select.center_policy == "start" else start + select.span_len // 2
        if token_kinds[start] != "bos" and token_kinds[anchor] in ("input", "delimiter"):
            spans.append(Candidate(start, start + select.span_len))
    return spans


def mean_score(candidate: Candidate, scores: NDArray[np.float64]) -> float:
    """Return the mean score of the span's tokens; the demo's first token, an attention sink, does not count."""
    tokens = candidate.scored_tokens()
    return float(np.mean(scores[tokens.start : tokens.stop])) if len(tokens) else 0.0


def attention_score(candidate: Candidate, evidence: Evidence) -> float:
    """Return the mean attention of the span's tokens."""
    return mean_score(candidate, evidence.attention)


def cut_into_pieces(token_kinds: tuple[TokenKind, ...], piece_len: int) -> NDArray[np.int64]:
    """Return the piece that each demo token after BOS is in, (L - BOS,): ``piece_len`` tokens each, counted from 0."""
    first = int(token_kinds[0] == "bos")
    return np.arange(len(token_kinds) - first) // piece_len


def visible_tokens(visible: NDArray[np.bool_], token_kinds: tuple[TokenKind, ...], piece_len: int) -> NDArray[np.bool_]:
    """Return masks of demo tokens, (M, L) bool, of masks of pieces, (M, pieces); BOS is always visible."""
    by_token = np.ones((len(visible), len(token_kinds)), dtype=bool)
    by_token[:, int(token_kinds[0] == "bos") :] = visible[:, cut_into_pieces(token_kinds, piece_len)]
    return by_token


def span_at(start: int, end: int, evidence: Evidence) -> Span:
    """Return a span that was not ranked; its score is the mean attention, for the record only."""
    return Span(start, end, attention_score(Candidate(start, end), evidence))


def pick_spaced(ordered: Iterable[Candidate], select: SelectBlock) -> list[Candidate]:
    """Pick greedily in the order given: starts at least ``min_span_distance`` apart, ``span_budget`` spans at most."""
    picked: list[Candidate] = []
    for candidate in ordered:
        if len(picked) == select.span_budget:
            break
        if all(abs(candidate.start - other.start) >= select.min_span_distance for other in picked):
            picked.append(candidate)
    return picked


def check_lead(min_lead: float) -> None:
    """Raise ValueError for a ``min_lead`` that is no share."""
    if not 0 <= min_lead <= 1:
        raise ValueError(f"min_lead = {min_lead} is no share of the best span's lead: from 0 (keep all) to 1 (the best alone)")


def keep_leading(spans: tuple[Span, ...], scores: Iterable[float], min_lead: float) -> tuple[Span, ...]:
    """Return the spans that lead: a budget is what may be kept at most, and spans that say nothing distract.

    A span's lead is (s - m) / (s_best - m), with m the mean score of all candidates: 1 for the best span, 0 for a mean one.
    Where no span is above the mean, nothing leads and all are kept.

    Args:
        scores: of all candidates.
        min_lead: the smallest lead that is kept; 0 keeps all spans.
    """
    if not spans or min_lead <= 0:
        return spans
    mean, best = float(np.mean(list(scores))), max(span.score for span in spans)
    return tuple(span for span in spans if best <= mean or span.score - mean >= min_lead * (best - mean))


def pick_top(scored: Iterable[tuple[Candidate, float]], select: SelectBlock) -> tuple[Span, ...]:
    """Pick greedily by score under the distance; of two equal scores the earlier span goes first."""
    scores = dict(scored)
    ordered = sorted(scores, key=lambda candidate: (-scores[candidate], candidate.start))
    return tuple(Span(c.start, c.end, scores[c]) for c in pick_spaced(ordered, select))


@dataclass(frozen=True)
class ScoredSpans(Selector):
    """Greedy by a score per candidate span under ``min_span_distance``."""

    @abstractmethod
    def span_scores(self, task: SelectionTask) -> Mapping[int, float]:
        """Return start -> score of every candidate."""

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        scores = self.span_scores(task)
        return pick_top(((span, scores[span.start]) for span in candidates(task.token_kinds, task.select)), task.select)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        """Return for each token the mean score of the candidates that hold it, (L,); 0 where none does."""
        total, count = np.zeros(len(task.token_kinds)), np.zeros(len(task.token_kinds))
        for start, score in self.span_scores(task).items():
            total[start : start + task.select.span_len] += score
            count[start : start + task.select.span_len] += 1
        return total / np.maximum(count, 1)
