"""What selectors share: their base class, the candidates of a demo, the score of a span, the greedy choice under a distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import SelectBlock
from cedkv.core.errors import ConfigError
from cedkv.core.registry import build
from cedkv.core.text import near_match
from cedkv.core.values import Candidate, Evidence, Selection, Span, TokenKind

Role = Literal["candidate", "reference", "oracle"]


@dataclass(frozen=True)
class SelectionTask:
    """All that a selector may look at, for one sample.

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

    Class variables:
        needs: fields of ``Evidence`` beyond attention; what no condition of a run needs is not computed.
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
        evidence = {field.name for field in fields(Evidence)} - {"attention"}
        if not cls.needs <= evidence:
            unknown = sorted(cls.needs - evidence)
            raise TypeError(f"{cls.__name__}.needs: {unknown} is no evidence{near_match(unknown[0], evidence)}")
        if cls.role not in get_args(Role):
            raise TypeError(f"{cls.__name__}.role = {cls.role!r}: it is one of {', '.join(get_args(Role))}")

    @abstractmethod
    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the chosen spans, at least one, in any order, each ``[start, end)`` inside the demo and after BOS."""


def selector_class(name: str) -> type[Selector]:
    """Return the class registered under a name. Raises ConfigError as ``Registry.get``."""
    cls: type[Selector] = SELECTORS.get(name)
    return cls


def create(select: SelectBlock) -> Selector:
    """Return the configured selector with its parameters. Raises ConfigError for parameters it does not take."""
    return build(selector_class(select.mode), select.params, "select.params")


def select_tokens(selector: Selector, task: SelectionTask) -> Selection:
    """Choose spans, and add what every selector keeps: BOS and the first ``keep_sink`` tokens after it.

    The selector sees the evidence that it declares in ``needs`` and no other, whatever was computed for others.

    Raises:
        ConfigError: a span outside the demo or over BOS, or more tokens than the budget of a bounded selector.
    """
    hidden: dict[str, Any] = dict.fromkeys({field.name for field in fields(Evidence)} - {"attention"} - selector.needs)
    evidence = replace(task.evidence, **hidden)
    spans = tuple(sorted(selector.choose(replace(task, evidence=evidence)), key=lambda span: span.start))
    first = int(task.token_kinds[0] == "bos")
    _check_spans(selector, spans, task.select, first, len(task.token_kinds))
    kept = set(range(min(first + task.select.keep_sink, len(task.token_kinds))))
    for span in spans:
        kept.update(range(span.start, span.end))
    return Selection(spans, tuple(sorted(kept)))


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


def attention_score(candidate: Candidate, evidence: Evidence) -> float:
    """Return the mean attention of the span's tokens; the demo's first token, an attention sink, does not count."""
    tokens = candidate.scored_tokens()
    return float(np.mean(evidence.attention[tokens.start : tokens.stop])) if len(tokens) else 0.0


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


def pick_top(scored: Iterable[tuple[Candidate, float]], select: SelectBlock) -> tuple[Span, ...]:
    """Pick greedily by score under the distance; of two equal scores the earlier span goes first."""
    scores = dict(scored)
    ordered = sorted(scores, key=lambda candidate: (-scores[candidate], candidate.start))
    return tuple(Span(c.start, c.end, scores[c]) for c in pick_spaced(ordered, select))
