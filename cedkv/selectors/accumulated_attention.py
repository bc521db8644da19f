"""Spans that later tokens attended to most, whatever the query: the score of H2O (Zhang et al. 2023), normalised.

H2O sums the attention a token receives; an early token is seen by more tokens and so collects more. Here the sum is
divided by the number of later tokens, those of the query included.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.kv.readings import ReceivedAttention, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from cedkv.selectors.base import Role


@dataclass(frozen=True)
class AccumulatedAttention(AttentionDiversitySpan):
    """Greedy by mean received attention; heads and layers are pooled as configured."""

    role: ClassVar[Role] = "reference"

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.of(ReceivedAttention())
