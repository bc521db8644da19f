"""Spans by attention times what the attended value writes into the residual stream: A_ij ||W_o v_j||.

CriticalKV (Feng et al. 2025, arXiv 2502.03805) takes the L1 norm; here it is the L2 norm, by the Gram matrix W_o^T W_o of
each head. Rows, heads, layers and neighbours are pooled as configured; all heads and layers share one selection.
"""

from dataclasses import dataclass

from cedkv.kv.readings import TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class ValueWeightedAttention(AttentionDiversitySpan):
    """As ``attention_diversity_span`` with ``select.value_weighting=output_norm``."""

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.attending(value_weighted=True)
