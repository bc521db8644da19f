"""Spans by attention of heads whose weights were fitted against ablations on held-out episodes (AT2, arXiv 2504.13752).

s_j = sum over layers and heads of w_h A_j^h, where A^h is the query's attention under one head (rows pooled as configured)
and the signed weights w_h are those of a ridge regression: under random span masks of episodes of another seed, the sum of
A^h over the visible tokens predicts the log-odds of the teacher's answer. They are kept beside the model's certificate and
never fitted on samples that are evaluated. All heads and layers share one selection.
"""

from dataclasses import dataclass, replace

from cedkv.kv.readings import TokenScore
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan


@dataclass(frozen=True)
class FittedHeads(AttentionDiversitySpan):
    """Greedy by the mean weighted attention of a span's tokens; every layer takes part, whatever ``layer_scope.selection``."""

    def token_score(self, configured: TokenScore) -> TokenScore:
        return replace(configured, heads="fitted", scope="all")
