"""Spans of keys with a small norm, which attract attention: -||k_j|| (Devoto et al. 2024, arXiv 2406.11430), without the query.

The mean over KV heads and layers, as configured; all heads and layers share one selection.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.kv.readings import KeyNorm, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class KeyNormSpan(AttentionDiversitySpan):
    """Greedy by the mean score of a span's tokens."""

    query_aware: ClassVar[bool] = False

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.of(KeyNorm())
