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
from cedkv.selectors.base import (
    SelectionTask,
    Selector,
    candidates,
    cut_into_pieces,
    mean_score,
    pick_top,
    visible_tokens,
)


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
        kinds, piece_len = task.token_kinds, self.piece_len or task.select.span_len
        piece = cut_into_pieces(kinds, piece_len)
        visible = task.rng.random((self.masks, int(piece.max()) + 1)) < 0.5
        weights = _lasso(visible, task.evidence.answer_odds(visible_tokens(visible, kinds, piece_len)), self.alpha)
        return np.concatenate([np.zeros(len(kinds) - len(piece)), weights[piece]])


def _lasso(visible: NDArray[np.bool_], odds: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return the weight of each piece."""
    from sklearn.linear_model import Lasso  # takes a second to import, and few runs need it
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    model = Lasso(alpha=alpha).fit(scaler.fit_transform(visible.astype(float)), odds)
    weights: NDArray[np.float64] = model.coef_ / scaler.scale_
    return weights
