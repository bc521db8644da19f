"""Spans that queries to come are expected to attend to (Devoto et al. 2025, arXiv 2510.00636), without the query.

Queries of the demo before RoPE are taken as N(mu, Sigma), and R as the mean of the rotations to the next ``future``
positions: s_j = (softmax_j((R mu) k_j s + k_j^T R Sigma R^T k_j s^2 / 2) + epsilon) ||W_o v_j||, with s the model's scaling
of scores. The first ``sinks`` tokens take no part and score 0: ``select.keep_sink`` keeps them. Heads and layers are pooled
as configured; all share one selection.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.kv.readings import ExpectedAttention, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class ExpectedAttentionSpan(AttentionDiversitySpan):
    """Greedy by the mean expected attention of a span's tokens."""

    query_aware: ClassVar[bool] = False

    future: int = 512
    epsilon: float = 1e-2
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1 or self.epsilon < 0 or self.sinks < 0:
            raise ValueError(
                f"future = {self.future}, epsilon = {self.epsilon}, sinks = {self.sinks}: future at least 1, epsilon and "
                "sinks 0 or more"
            )

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.of(ExpectedAttention(self.future, self.epsilon, self.sinks))
