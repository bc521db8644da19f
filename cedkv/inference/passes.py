"""Which passes a batch needs and what each must read, from the configurations; what a model cannot give is rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError, ModelError
from cedkv.core.values import OnSample
from cedkv.kv.readings import (
    ExpectedAttention,
    QueryAttention,
    Reading,
    ReplayAttention,
    RowAttention,
    SpanDrop,
    TokenScore,
    ValueNorm,
)
from cedkv.models.capabilities import Capabilities
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import ModelSpec
from cedkv.models.output_projection import grams, unsupported_projection
from cedkv.selectors.base import configured_score, create, query_window

NULL_QUERY, REPEAT = "N/A", "\n\nRepeat the previous context exactly.\n"
"""A query without content (ICR, arXiv 2410.02642), and KVzip's instruction to repeat the demo."""


@dataclass(frozen=True)
class Passes:
    """What the passes of a batch must read, for all configurations.

    own, other: readings of the pass over demo + query, and of the pass with the other query.
    null, replay: rows to read of a null query and of a replay of the demo.
    cached: readings of the demos' cached K/V.
    """

    own: frozenset[Reading]
    other: frozenset[Reading]
    null: frozenset[Reading]
    replay: frozenset[Reading]
    cached: frozenset[Reading]

    @property
    def over_cache(self) -> bool:
        """Whether the demos' K/V must be kept."""
        return bool(self.other or self.null or self.replay or self.cached)


def token_scores(config: Phase2Config) -> tuple[TokenScore, TokenScore]:
    """Return the configured aggregation of the query's attention, and the score that the selector asks for."""
    configured = configured_score(config)
    return configured, create(config.select).token_score(configured)


def needed_evidence(configs: Sequence[Phase2Config]) -> frozenset[str]:
    """Return the fields of ``Evidence`` beyond attention and scores that these configurations need."""
    fields = {name for config in configs for name in create(config.select).needs}
    if any(config.select.causal_drop_advisory for config in configs):
        fields.add("causal_drop")
    return frozenset(fields)


def plan_passes(configs: Sequence[Phase2Config]) -> Passes:
    """Return what the passes of a batch must read."""
    found: dict[str, set[Reading]] = {name: set() for name in ("own", "other", "null", "replay", "cached")}
    for config in configs:
        for reading in [score.reading for score in token_scores(config)]:
            if reading.weighs_values and isinstance(reading, QueryAttention | ReplayAttention):
                found["own"].add(ValueNorm())
            if isinstance(reading, QueryAttention):
                found[reading.query].add(reading.rows)
                if (mass := mass_rows(reading)) is not None:
                    found["own"].add(mass)
                if reading.null_query:
                    found["null"].add(reading.rows)
            elif isinstance(reading, ReplayAttention):
                found["replay"].add(replay_rows(reading))
            else:
                found["cached" if reading.from_cache else "own"].add(reading)
        if "span_drop" in needed_evidence([config]):
            found["own"].add(span_drop(config))
    return Passes(**{name: frozenset(readings) for name, readings in found.items()})


@dataclass(frozen=True)
class ExtraQueries:
    """A pass over the demos' caches: a query per sample, how many of its last tokens are read, and what."""

    rows: list[tuple[int, ...]]
    counts: list[int]
    readings: frozenset[Reading]


def extra_queries(passes: Passes, tokenizer: Any, samples: Sequence[OnSample]) -> dict[str, ExtraQueries]:
    """Return the passes that run beside the one over demo + query, by name.

    Raises:
        DataError: another query is needed and a sample has none.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    found = {}
    if passes.other:
        without = [sample.sample_id for sample in samples if sample.other_query_ids is None]
        if without:
            raise DataError(f'sample {without[0]}: "other_query_text" is needed in every line of data.on_path')
        others = [sample.other_query_ids or () for sample in samples]
        found["other query"] = ExtraQueries(others, [len(query) for query in others], passes.other)
    if passes.null:
        null = ids(NULL_QUERY)
        found["null query"] = ExtraQueries([null] * len(samples), [len(null)] * len(samples), passes.null)
    if passes.replay:
        repeat, demos = ids(REPEAT), [sample.demo_token_ids[int(sample.has_bos) :] for sample in samples]
        found["replay"] = ExtraQueries([repeat + demo for demo in demos], [len(demo) for demo in demos], passes.replay)
    return found


def mass_rows(reading: Reading) -> RowAttention | None:
    """Return the mean of the rows that a reading takes of a sample's own query: what they pay to tokens adds up to a mass."""
    if isinstance(reading, QueryAttention) and reading.query == "own":
        return replace(reading.rows, pooling="mean")
    return None


def replay_rows(reading: ReplayAttention) -> RowAttention:
    """Return the rows of a replay that a reading takes: the largest attention of any of them."""
    return RowAttention(None, "max", over_input=reading.plus)


def span_drop(config: Phase2Config) -> SpanDrop:
    """Return the closed-form drop of a configuration's spans."""
    return SpanDrop(config.select.span_len, query_window(config.select))


def check_readings(spec: ModelSpec, configs: Sequence[Phase2Config]) -> None:
    """Reject, before weights are loaded, what a selector reads and this model cannot give.

    Raises:
        ModelError: names the selector, what it reads, and what would work.
    """
    needing = {reading: config.select.mode for config in configs for reading in plan_passes([config]).own}
    _check_linear(spec.capabilities, spec.source, needing)
    weighing = [(reading, mode) for reading, mode in needing.items() if reading.weighs_values]
    if weighing and (missing := unsupported_projection(spec)) is not None:
        reading, mode = weighing[0]
        raise _cannot_read(mode, reading, spec.source, f"it weighs values by W_o, and {missing}")


def _check_linear(capabilities: Capabilities, model: str, needing: Mapping[Reading, str]) -> None:
    """Raise ModelError for scores that are not linear in the query where a selector reads what takes them to be."""
    for reading, mode in needing.items():
        if reading.linear_scores and capabilities.softcap is not None:
            reason = f"its attention scores are soft-capped at {capabilities.softcap}, not linear in the query"
            raise _cannot_read(mode, reading, model, reason)


def check_loaded_readings(lm: LanguageModel, configs: Sequence[Phase2Config]) -> None:
    """Raise if a loaded model cannot give what a selector reads.

    Raises:
        ModelError: the output projection is not given the attention output, keys follow no rotation known here, or scores
            are soft-capped.
    """
    for config in configs:
        readings = plan_passes([config]).own
        _check_linear(lm.capabilities, lm.meta["model_id"], dict.fromkeys(readings, config.select.mode))
        for reading in readings:
            if reading.weighs_values:
                grams(lm)
            if isinstance(reading, ExpectedAttention) and lm.capabilities.positions == "rotary" and lm.rope_layouts is None:
                reason = "the keys of this model did not follow any rotation known here"
                raise _cannot_read(config.select.mode, reading, lm.meta["model_id"], reason)


def _cannot_read(mode: str, reading: Reading, model: str, reason: str) -> ModelError:
    return ModelError(
        f"select.mode={mode} reads {type(reading).__name__}, which {model} does not give: {reason}; use a selector by "
        "attention with select.value_weighting=none, or another model"
    )
