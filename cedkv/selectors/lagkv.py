"""Spans whose keys and values spread most on the scale of the tokens after them: LagKV (Liang et al. 2025, arXiv 2504.04704).

After ``sinks`` tokens the demo is cut into partitions of ``lag`` tokens. With min and max per channel over the *next*
partition, u_j = softmax_j(std over channels of (x_j - min) / (max - min)) for x = k and x = v; the score is the rank of u^k
+ u^v in its partition, over ``lag``. Sinks and the last tokens, which no partition follows, score 1: LagKV always keeps
them. The paper's lag is 128 in contexts of thousands. Heads and layers are pooled as configured; all share one selection.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.kv.readings import LagRelative, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class LagKV(AttentionDiversitySpan):
    """Greedy by the mean rank of a span's tokens."""

    query_aware: ClassVar[bool] = False

    lag: int = 16
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2 or self.sinks < 0:
            raise ValueError(f"lag = {self.lag}, sinks = {self.sinks}: lag at least 2, sinks 0 or more")

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.of(LagRelative(self.lag, self.sinks))
