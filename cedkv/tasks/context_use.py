"""What a pass of an arm uses of a model's context for one prompt: positions, and slots of the cache plus tokens.

The only place where either is added up. What the configuration and the samples say of every arm of a run is put together in
``inference.context_window``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cedkv.core.errors import UnusableSample
from cedkv.core.values import OffSample, OnSample, Placement

Kind = Literal["ON", "OFF", "query"]
"""What a prompt is: of an ON sample, an OFF prompt, or a query that the user of a prefix gives."""


@dataclass(frozen=True)
class ContextUse:
    """What one prompt uses under one arm.

    arm: name of the arm, as the progress bar has it.
    kind, sample_id: of the prompt.
    start: position of the prompt's first token.
    slots: slots of the cache in front of the prompt, null slots included; they may be more or fewer than ``start``.
    tokens: tokens of the prompt.
    given: tokens that follow the prompt: an answer without its last token, what base answers to an OFF prompt, new text.
    behind: what stands in front of the prompt, for messages; empty for nothing.
    """

    arm: str
    kind: Kind
    sample_id: str
    start: int
    slots: int
    tokens: int
    given: int = 0
    behind: str = ""

    @property
    def positions(self) -> int:
        """Number of positions: the highest one that is used, plus 1."""
        return self.start + self.tokens + self.given

    @property
    def length(self) -> int:
        """Number of slots, null slots included, and tokens in the pass of the last token."""
        return self.slots + self.tokens + self.given

    def beyond(self, unit: Literal["positions", "slots and tokens"], limit: int, reason: str) -> UnusableSample:
        """Return the error of a prompt that needs more than a model has.

        Args:
            unit: what is limited.
            reason: where the limit comes from.
        """
        needed, front = (self.positions, self.start) if unit == "positions" else (self.length, self.slots)
        parts = [f"{front} {unit.split()[0]} in front ({self.behind})"] if front else []
        parts += [f"{self.tokens} tokens of its own"] + [f"{self.given} tokens that follow"] * bool(self.given)
        name = self.sample_id if self.kind == "query" else f"sample {self.sample_id}"
        lower = {"ON": "data.pairs", "OFF": "data.pairs or eval.off_tokens", "query": "max_new_tokens"}[self.kind]
        remedies = f"shorten the text, or lower {lower}"
        if self.behind.startswith("the prefix"):
            remedies += ", or let the prefix take less room (injection.positioning_mode=compact, prefix_len, another selector)"
        return UnusableSample(
            "longer than the model's context",
            f"{name} needs {needed} {unit} in the arm {self.arm!r}, the model has {limit} ({reason}): {', '.join(parts)}. "
            f"Numbers beyond that mean nothing; {remedies}",
        )


def base_use(sample: OnSample) -> ContextUse:
    """Return what base uses: the query alone, and its answer."""
    return ContextUse("base", "ON", sample.sample_id, 0, 0, len(sample.base_ids), _given(sample))


def teacher_use(sample: OnSample) -> ContextUse:
    """Return what the teacher uses: demo and query in one pass or one after the other, and the answer."""
    return over_demo_use("teacher", sample, len(sample.query_token_ids), _given(sample))


def over_demo_use(arm: str, sample: OnSample, tokens: int, given: int = 0) -> ContextUse:
    """Return what ``tokens`` tokens behind a sample's whole demo use."""
    length = len(sample.demo_token_ids)
    return ContextUse(arm, "ON", sample.sample_id, length, length, tokens, given, f"its demo of {length} tokens")


def select_use(sample: OnSample, placement: Placement, behind: str, arm: str = "select") -> ContextUse:
    """Return what a query uses behind a prefix: its own, its partner's or a random one, as it is placed."""
    tokens = len(sample.query_token_ids)
    return ContextUse(arm, "ON", sample.sample_id, placement.query_start, placement.slots, tokens, _given(sample), behind)


def off_base_use(prompt: OffSample, off_tokens: int) -> ContextUse:
    """Return what base uses for an OFF prompt and its own answer, ``off_tokens`` tokens at most."""
    return ContextUse("OFF base", "OFF", prompt.sample_id, 0, 0, len(prompt.token_ids), off_tokens)


def off_select_use(sample_id: str, tokens: int, placement: Placement, off_tokens: int, behind: str) -> ContextUse:
    """Return what an OFF prompt of ``tokens`` tokens uses behind a prefix, with ``off_tokens`` tokens of base's answer."""
    start, slots = placement.query_start, placement.slots
    return ContextUse("OFF select", "OFF", sample_id, start, slots, tokens, off_tokens, behind)


def require_positions(use: ContextUse, positions: int) -> None:
    """Raise UnusableSample if a prompt needs more positions than a model has."""
    if use.positions > positions:
        raise use.beyond("positions", positions, "max_position_embeddings, or the original one of a longrope")


def _given(sample: OnSample) -> int:
    return max(0, len(sample.answer_token_ids) - 1)
