"""Spans the query of *another* question about the same demo attends to most: does a selection serve more than its query?"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.kv.readings import TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from cedkv.selectors.base import Role


@dataclass(frozen=True)
class TransferSpan(AttentionDiversitySpan):
    """As ``attention_diversity_span``, with the other query's attention."""

    role: ClassVar[Role] = "reference"

    def token_score(self, configured: TokenScore) -> TokenScore:
        return configured.attending(query="other")
