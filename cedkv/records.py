"""What a unit of work leaves behind: plain records, from which every figure is computed. ``cedkv.recording`` makes them.

Names are those of the tables and of ``metrics.jsonl``. KL in nats, log-probabilities natural; "per trial" lists have one
value per random trial. A record is JSON: one line of the journal holds those of a unit.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from cedkv.core.values import Record


class TopToken(TypedDict):
    """One of the most probable tokens of an arm."""

    token_id: int
    """Its id in the vocabulary."""
    text: str
    """The token's text inside a text, leading space included."""
    logprob: float
    """Natural log-probability."""


class OnRecord(TypedDict):
    """One ON sample under every arm."""

    type: Literal["sample"]
    """What kind of line this is."""
    kind: Literal["on"]
    """ON sample."""
    sample_id: str
    """The sample's id, the same in every run on it."""
    answer_token_id: int
    """The answer's first token."""
    token_base: int
    """Greedy token of an arm: argmax over the full vocabulary."""
    token_teacher: int
    """As ``token_base``."""
    token_select: int
    """As ``token_base``."""
    token_random: list[int]
    """Per trial."""
    correct_base: bool
    """Every token of the answer (``answer_token_ids``; often only one) is the greedy one where it stands."""
    correct_teacher: bool
    """As ``correct_base``."""
    correct_select: bool
    """As ``correct_base``."""
    correct_random: list[bool]
    """Per trial; empty where no random arm was run."""
    answer_logprob_base: float
    """Of all tokens of the answer, natural."""
    answer_logprob_teacher: float
    """As ``answer_logprob_base``."""
    answer_logprob_select: float
    """As ``answer_logprob_base``."""
    answer_logprob_random: list[float]
    """Per trial."""
    kl_base_teacher: float
    """KL(base || teacher)."""
    kl_select_teacher: float
    """KL(select || teacher)."""
    kl_random_teacher: list[float]
    """Per trial."""
    kl_random_base: list[float]
    """Per trial."""
    random_same: list[bool]
    """Per trial: it keeps the same tokens as select."""
    phase2_delta_on_select: float
    """KL(select || base)."""
    phase2_answer_logprob_gain: float
    """log p_select(answer) - log p_base(answer)."""
    rel_kl_to_teacher: float
    """KL(select || teacher) / (KL(base || teacher) + 1e-6)."""
    kl_base_teacher_labels: NotRequired[float]
    """KL(base || teacher) among the sample's labels, both renormalised; like all of its kind, where the sample has labels."""
    kl_select_teacher_labels: NotRequired[float]
    """KL(select || teacher) among the sample's labels."""
    kl_random_teacher_labels: NotRequired[list[float]]
    """Per trial."""
    correct_base_labels: NotRequired[bool]
    """The most probable of the labels is the answer's."""
    correct_teacher_labels: NotRequired[bool]
    """As ``correct_base_labels``."""
    correct_select_labels: NotRequired[bool]
    """As ``correct_base_labels``."""
    correct_random_labels: NotRequired[list[bool]]
    """Per trial."""
    gold_depth: NotRequired[float]
    """Where the gold tokens start in the demo, from 0 to 1; where the sample says which they are."""
    topk: NotRequired[dict[str, list[TopToken]]]
    """Arm -> its most probable tokens, ``reporting.topk_tokens`` of them."""
    phase2_selection_score_attention: float
    """Mean attention score of the selected spans."""
    selector_score: float
    """Mean of the selector's own scores of the selected spans."""
    phase2_selection_score_causal_drop: NotRequired[float | None]
    """Mean causal drop of the selected spans that are candidates; where causal drops were computed."""
    candidate_causal_drop: NotRequired[list[float]]
    """Of every candidate, by start."""
    candidate_attention: NotRequired[list[float]]
    """Of every candidate, by start."""
    gold_coverage: NotRequired[float]
    """Share of the gold tokens that are kept; where the sample says which they are, and the prefix is of its own demo."""
    gold_coverage_random: NotRequired[list[float]]
    """Per trial; where the sample says which its gold tokens are."""
    lds: NotRequired[float]
    """Rank correlation of scores with the teacher's answers under span masks (``quality.lds``); with ``eval.lds_masks``."""
    comprehensiveness: NotRequired[float]
    """log p_teacher - log p_teacher without the selected spans, of the answer's first token, in nats; with
    ``eval.lds_masks``."""


class OffRecord(TypedDict):
    """One OFF prompt, alone and under the prefix of an ON sample."""

    type: Literal["sample"]
    """What kind of line this is."""
    kind: Literal["off"]
    """OFF prompt."""
    sample_id: str
    """The prompt's id, the same in every run on it."""
    state_of: str
    """The ON sample whose prefix it runs under."""
    token_base: int
    """Greedy token of the prompt alone."""
    token_select: int
    """Greedy token under the prefix."""
    same_token: bool
    """Both greedy tokens are the same."""
    phase2_delta_off_select: float
    """KL(select || base)."""
    base_entropy: float
    """Entropy of base's distribution of the next token, in nats."""
    further_token_ids: list[int]
    """Base's own greedy answer to the prompt, ``eval.off_tokens`` tokens of it, or until it ends."""
    further_kl: list[float]
    """KL(select || base) after each of these tokens, all of them given."""
    further_same: list[bool]
    """The greedy token after each of these tokens is base's."""
    prompt_text: str
    """As the model reads it: inside the chat template where there is one."""
    token_ids: list[int]
    """The prompt's tokens."""


class SpanRecord(TypedDict):
    """A chosen span ``[start, end)`` of demo tokens and its score."""

    start: int
    """First demo token."""
    end: int
    """The demo token behind the last one."""
    score: float
    """The selector's score of the span."""


class PrefixRecord(TypedDict):
    """What a prefix is made of, and where its tokens are placed."""

    spans: list[SpanRecord]
    """In the order of the demo."""
    kept_tokens: list[int]
    """Demo indices, ascending: BOS, sinks and spans."""
    key_positions: list[int]
    """Rotary position of each kept token."""
    query_start: int
    """Position of the query's first token."""
    prefix_slots: int
    """Slots, null ones included."""


class RandomPrefixRecord(PrefixRecord):
    """The prefix of a random trial."""

    trial: int
    """Number of the trial, from 0."""


class SelectionRecord(PrefixRecord):
    """All that an outside program needs to build a sample's prefixes again with plain transformers."""

    type: Literal["selection"]
    """What kind of line this is."""
    sample_id: str
    """The ON sample."""
    demo_text: str
    """The demonstration."""
    query_text: str
    """The query."""
    answer_text: str
    """The answer."""
    demo_token_ids: list[int]
    """Of the demo, BOS included."""
    query_token_ids: list[int]
    """Of the query."""
    answer_token_id: int
    """The answer's first token."""
    answer_token_ids: list[int]
    """What must be answered: the answer's first token, or all of its tokens (``data.answer``)."""
    token_kinds: list[str]
    """Of each demo token: bos, input, delimiter or answer."""
    label_token_ids: list[int]
    """The answers that the demo knows and the sample's own, by their first token, ascending; empty where there are no two."""
    gold_tokens: NotRequired[list[int]]
    """The demo tokens ``[start, end)`` that hold the answer; where the sample says which."""
    scores: list[float]
    """What the selector holds each demo token to be worth; the configured attention where it ranks no tokens."""
    scores_of: Literal["selector", "attention"]
    """Whose scores these are."""
    lds_visible: NotRequired[list[list[int]]]
    """The visible pieces under each mask, by number: the demo after BOS in pieces of ``select.span_len``."""
    lds_log_odds: NotRequired[list[float]]
    """log p / (1 - p) of ``lds_token_id`` under each mask, with the query over the demo's cache."""
    lds_token_id: NotRequired[int]
    """The teacher's greedy token."""
    prefix_of: str
    """The sample whose demo the kept tokens are of: this one, but for a selector that uses partners."""
    random: list[RandomPrefixRecord]
    """The prefix of every random trial."""


class ReproRecord(TypedDict):
    """The select arm of one sample in a repetition."""

    type: Literal["repro"]
    """What kind of line this is."""
    repeat: int
    """Number of the repetition, from 1."""
    sample_id: str
    """The ON sample."""
    token_select: int
    """Greedy token."""
    correct_select: bool
    """Whether it is the answer."""
    answer_logprob_select: float
    """Of all tokens of the answer, natural."""


class HeadsRecord(TypedDict):
    """The attention of a unit's queries to gold tokens, by layer and head; where the selector's score reads such rows."""

    type: Literal["heads"]
    """What kind of line this is."""
    window: int | None
    """Last rows of a query over which the mean is taken; None for all."""
    layers: list[int]
    """All layers, by their number in the model."""
    total: list[list[float]]
    """(layers, H): the sum over the unit's ``n`` samples of the attention to all gold tokens of a sample, to 6 decimals."""
    n: int
    """Samples of the unit that say which their gold tokens are."""


PlumbingRecord = Record
"""One sample of Gate A: ``type``, ``sample_id``, and a value for every observation that was made on it (``checks``)."""
