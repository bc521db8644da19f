"""The prefix of another episode: must not help, whatever else an injected prefix does to an answer."""

from cedkv.selectors.attention_diversity_span import choose

__all__ = ["choose"]

REFERENCE = "the prefix of another episode"
PARTNER = True
