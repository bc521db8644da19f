"""What passes of a tiny model really use: the highest position and the longest row of every arm, seen at the model itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cedkv.models.loading import LanguageModel


class Seen:
    """Collects what the model is called with, by arm: ``step`` is given to the engine and says which arm begins.

    Attributes:
        positions: arm -> highest position + 1. length: arm -> slots of the cache + tokens, padding included.
    """

    def __init__(self) -> None:
        self.arm = "before"
        self.positions: dict[str, int] = defaultdict(int)
        self.length: dict[str, int] = defaultdict(int)

    def step(self, arm: str, n: int) -> None:
        """Take the arms of repetitions, and random trials, as one each."""
        self.arm = "repeat" if arm.startswith("repeat") else arm.split()[0] if arm.startswith("random") else arm

    @contextmanager
    def watch(self, lm: LanguageModel) -> Iterator[None]:
        """Look at every pass of the model inside the context."""
        hook = lm.model.base_model.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _see(self, module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions, cache = named.get("position_ids"), named.get("cache", named.get("past_key_values"))  # by version
        width = named["input_ids"].shape[1]
        highest = width if positions is None else int(positions.max()) + 1
        slots = 0 if cache is None or not cache.layers else cache.layers[0].keys.shape[2]
        self.positions[self.arm] = max(self.positions[self.arm], highest)
        self.length[self.arm] = max(self.length[self.arm], slots + width)
