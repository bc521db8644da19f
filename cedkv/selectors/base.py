"""What selectors share: the candidates of a demo, the score of a span, the greedy choice under a distance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cedkv.config.schema import SelectBlock
from cedkv.core.values import Candidate, Evidence, Span, TokenKind


@dataclass(frozen=True)
class SelectionTask:
    """All a selector may look at.

    ``rng`` belongs to this (sample, trial); a selector that draws nothing leaves it alone.
    """

    select: SelectBlock
    token_kinds: tuple[TokenKind, ...]
    evidence: Evidence
    rng: np.random.Generator


def candidates(token_kinds: tuple[TokenKind, ...], select: SelectBlock) -> list[Candidate]:
    """Spans inside the demo whose start (or center) is an input or delimiter token, by ascending start."""
    found = []
    for start in range(len(token_kinds) - select.span_len + 1):
        anchor = start if select.center_policy == "start" else start + select.span_len // 2
        if token_kinds[start] != "bos" and token_kinds[anchor] in ("input", "delimiter"):
            found.append(Candidate(start, start + select.span_len))
    return found


def attention_score(candidate: Candidate, evidence: Evidence) -> float:
    """Mean attention of the span's tokens; the demo's first token, an attention sink, does not count."""
    tokens = candidate.scored_tokens()
    return float(np.mean(evidence.attention[tokens.start : tokens.stop])) if len(tokens) else 0.0


def span_at(start: int, end: int, evidence: Evidence) -> Span:
    """A span that was not ranked; its score is the mean attention, for the record only."""
    return Span(start, end, attention_score(Candidate(start, end), evidence))


def pick_spaced(ordered: Iterable[Candidate], select: SelectBlock) -> list[Candidate]:
    """Greedily, in the order given: starts at least ``min_span_distance`` apart, ``span_budget`` spans at most."""
    taken: list[Candidate] = []
    for candidate in ordered:
        if len(taken) == select.span_budget:
            break
        if all(abs(candidate.start - other.start) >= select.min_span_distance for other in taken):
            taken.append(candidate)
    return taken


def pick_top(scored: Iterable[tuple[Candidate, float]], select: SelectBlock) -> tuple[Span, ...]:
    """Greedy by score; of two equal scores the earlier span goes first."""
    scores = dict(scored)
    ordered = sorted(scores, key=lambda c: (-scores[c], c.start))
    return tuple(Span(c.start, c.end, scores[c]) for c in pick_spaced(ordered, select))
