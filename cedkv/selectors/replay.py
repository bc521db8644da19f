"""Spans that a repetition of the demo attends to most: KVzip (Kim et al. 2025, arXiv 2505.23416), without the query.

After the demo, "Repeat the previous context exactly." and the demo again: s_j = max over the repetition's rows i and over
heads of A_ij; with ``plus`` of A_ij ||W_o v_j|| / ||h_i||, h_i the input of the attention module in row i (KVzip+). KVzip
chooses per KV head and layer; here layers are pooled as configured and all share one selection.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from cedkv.kv.readings import ReplayAttention, TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class Replay(AttentionDiversitySpan):
    """Greedy by the mean replay score of a span's tokens."""

    query_aware: ClassVar[bool] = False

    plus: bool = False

    def token_score(self, configured: TokenScore) -> TokenScore:
        return replace(configured, reading=ReplayAttention(self.plus), heads="max")
