"""Spans of keys unlike the average key of the demo: -cos(k_j, mean k), without the query (KeyDiff, arXiv 2504.15364).

Keys as they are cached, rotated to their demo positions. Heads and layers are pooled as configured; all share one selection.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.kv.readings import KeyDifference, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class KeyDifferenceSpan(AttentionDiversitySpan):
    """Greedy by the mean score of a span's tokens."""

    query_aware: ClassVar[bool] = False

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.of(KeyDifference())
