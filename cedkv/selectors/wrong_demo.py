"""The prefix of another episode: must not help, whatever else an injected prefix does to an answer."""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from cedkv.selectors.base import Role


@dataclass(frozen=True)
class WrongDemo(AttentionDiversitySpan):
    """Spans of the sample's own demo by mean attention; the prefix goes in front of its partner's query."""

    role: ClassVar[Role] = "reference"
    uses_partner: ClassVar[bool] = True
