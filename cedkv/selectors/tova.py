"""TOVA (Oren et al. 2024, arXiv 2401.06104) as an aggregation: the attention of the last query row, mean over heads.

TOVA chooses tokens per layer; here the mean over all layers makes one selection.
"""

from dataclasses import dataclass

from cedkv.kv.readings import QueryAttention, RowAttention, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class Tova(AttentionDiversitySpan):
    """Whatever ``select`` says of pooling: the method's own aggregation."""

    def token_score(self, configured: TokenScore) -> TokenScore:
        return TokenScore(QueryAttention(RowAttention(1, "mean")))
