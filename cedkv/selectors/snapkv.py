"""SnapKV (Li et al. 2024, arXiv 2404.14469) as an aggregation: the mean of the last rows, smoothed over neighbouring tokens.

Mean over the last ``window`` query rows, heads and all layers, then over ``kernel`` neighbours. SnapKV chooses tokens per KV
head and layer; here all heads and layers share one selection.
"""

from dataclasses import dataclass

from cedkv.kv.readings import QueryAttention, RowAttention, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class SnapKV(AttentionDiversitySpan):
    """Whatever ``select`` says of pooling: the method's own aggregation; a query of fewer rows is read whole."""

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window = {self.window}, kernel = {self.kernel}: window at least 1, kernel odd")

    def token_score(self, configured: TokenScore) -> TokenScore:
        return TokenScore(QueryAttention(RowAttention(self.window, "mean")), kernel=self.kernel)
