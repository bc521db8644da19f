"""Which samples belong together: the state that an OFF prompt runs under, and partners."""

from __future__ import annotations


def off_owner(prompt: int, n_on: int) -> int:
    """Return the ON sample under whose state an OFF prompt runs: ``prompt mod n_on``."""
    return prompt % n_on


def partner(sample: int, n_on: int) -> int:
    """Return a sample's partner: 2i and 2i + 1 are partners; where their number is odd, the last takes the one before it."""
    return sample ^ 1 if (sample ^ 1) < n_on else sample - 1
