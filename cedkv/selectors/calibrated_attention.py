"""Spans by attention of the query less attention of a query without content ("N/A") over the same cached demo.

What any query attends to (sinks, line breaks) cancels: ICR (Chen et al. 2024, arXiv 2410.02642), QRHead (2506.09944). The
difference is taken per layer and head, after pooling over rows and before pooling over heads. All heads and layers share one
selection.
"""

from dataclasses import dataclass

from cedkv.kv.readings import TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class CalibratedAttention(AttentionDiversitySpan):
    """As ``attention_diversity_span`` with ``select.null_query=true``."""

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.attending(null_query=True)
