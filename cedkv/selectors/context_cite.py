"""Spans by the weights of a sparse linear model of what hiding does: ContextCite (Cohen-Wang et al. 2024, arXiv 2409.00729).

The demo is cut into pieces of ``piece_len`` tokens. Under ``masks`` random masks, in which each piece is visible with
probability 0.5, the log-odds log p / (1 - p) of the teacher's own answer are regressed on the mask by LASSO (``alpha``),
columns standardised; a token's score is the weight of its piece. Hidden pieces are masked out of the demo's cache: later
tokens had seen them.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cedkv.config.schema import SelectBlock
from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, candidates, mean_score, pick_top


@dataclass(frozen=True)
class ContextCite(Selector):
    """Greedy by the mean weight of a span's tokens; ``piece_len`` 0 is ``select.span_len``."""

    needs: ClassVar[frozenset[str]] = frozenset({"answer_odds"})

    masks: int = 64
    alpha: float = 0.01
    piece_len: int = 0

    def __post_init__(self) -> None:
        if self.masks < 2 or self.alpha <= 0 or self.piece_len < 0:
            raise ValueError(
                f"masks = {self.masks}, alpha = {self.alpha}, piece_len = {self.piece_len}: at least 2 masks, alpha above 0, "
                "piece_len 0 or more"
            )

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans. Raises ValueError: the evidence holds no answers under masks."""
        scores = self.worth(task)
        return pick_top(((span, mean_score(span, scores)) for span in candidates(task.token_kinds, task.select)), task.select)

    def rows_at_most(self, n_candidates: int, select: SelectBlock) -> int:
        return self.masks

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        if task.evidence.answer_odds is None:
            raise ValueError("context_cite needs evidence with answers under masks")
        first, length = int(task.token_kinds[0] == "bos"), len(task.token_kinds)
        piece = (np.arange(first, length) - first) // (self.piece_len or task.select.span_len)
        visible = task.rng.random((self.masks, int(piece.max()) + 1)) < 0.5
        by_token = np.ones((self.masks, length), dtype=bool)
        by_token[:, first:] = visible[:, piece]
        scores = np.zeros(length)
        scores[first:] = _lasso(visible, task.evidence.answer_odds(by_token), self.alpha)[piece]
        return scores


def _lasso(visible: NDArray[np.bool_], odds: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return the weight of each piece."""
    from sklearn.linear_model import Lasso  # takes a second to import, and few runs need it
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    model = Lasso(alpha=alpha).fit(scaler.fit_transform(visible.astype(float)), odds)
    weights: NDArray[np.float64] = model.coef_ / scaler.scale_
    return weights
