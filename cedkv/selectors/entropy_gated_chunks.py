"""Chunks of the demo, of spiky ones their best tokens alone: kvpress 0.5.5, after ChunkKV (arXiv 2502.00299).

The demo is cut into chunks of ``chunk_len`` tokens; a chunk's score is the mean score of its tokens (under the configured
aggregation), its entropy that of the scores in it, over the log of its length. By falling score, a chunk of at least median
score and less than median entropy keeps its ``spiky_len`` best tokens, any other all of them (its best ones where the budget
ends); what is left of the budget goes to the best remaining tokens. BOS is no part of it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector

EPSILON = 1e-12


@dataclass(frozen=True)
class EntropyGatedChunks(Selector):
    """``span_budget x span_len`` tokens; each run of kept tokens is a span."""

    chunk_len: int = 10
    spiky_len: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.spiky_len < self.chunk_len:
            raise ValueError(f"spiky_len = {self.spiky_len} must be at least 1 and below chunk_len = {self.chunk_len}")

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        first, length = int(task.token_kinds[0] == "bos"), len(task.token_kinds)
        scores = task.evidence.scores
        chunks = [np.arange(at, min(at + self.chunk_len, length)) for at in range(first, length, self.chunk_len)]
        means = np.array([scores[chunk].mean() for chunk in chunks])
        entropies = np.array([_entropy(scores[chunk]) for chunk in chunks])
        spiky = (means >= np.median(means)) & (entropies < np.median(entropies))
        room, kept = task.select.span_budget * task.select.span_len, np.zeros(length, dtype=bool)
        for i in np.argsort(-means, kind="stable"):
            n = min(room, self.spiky_len if spiky[i] else len(chunks[i]), len(chunks[i]))
            kept[_best(chunks[i], scores, n)] = True
            room -= n
        rest = np.flatnonzero(~kept[first:]) + first
        kept[_best(rest, scores, min(room, len(rest)))] = True
        edges = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(int), [0]])))
        return tuple(Span(int(a), int(b), float(scores[a:b].mean())) for a, b in zip(edges[::2], edges[1::2], strict=True))

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        return task.evidence.scores


def _best(tokens: NDArray[np.int64], scores: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    return tokens[np.argsort(-scores[tokens], kind="stable")[:n]]


def _entropy(scores: NDArray[np.float64]) -> float:
    """Return the entropy of a chunk's scores as a share of the largest possible one; negative scores are raised to 0 first."""
    if len(scores) < 2:
        return 0.0
    raised = scores - min(0.0, float(scores.min()))
    p = raised / (raised.sum() + EPSILON)
    return float(np.clip(-(p * np.log(p + EPSILON)).sum() / np.log(len(p)), 0, 1))
