"""Random draws that depend only on what they are for.

Every generator is seeded by a digest of (seed, purpose, trial, sample id): order, batching, sharding and resuming change
nothing, and a sample is the same however many others there are.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def rng_for(seed: int, purpose: str, trial: int, sample_id: str) -> np.random.Generator:
    """Return the generator of one draw; ``purpose`` separates draws that would otherwise be the same."""
    from numpy.random import default_rng  # numpy takes its time, and a wrong configuration is rejected without it

    text = f"{seed}\x1f{purpose}\x1f{trial}\x1f{sample_id}"
    return default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))
