"""From a demo and queries as texts to samples without an answer, tokenised and checked as those of a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.text import preview
from cedkv.core.values import OnEpisode, OnSample, TokenKind
from cedkv.models.loading import LanguageModel
from cedkv.tasks.demo_answers import guess_kinds, guess_shots
from cedkv.tasks.load import check_prefix_len, check_sample
from cedkv.tasks.tokenize import SampleTokenizer, tokenize_prompt

Range = tuple[int, int]
"""Characters ``[start, end)``."""
Kinds = Sequence[tuple[int, int, TokenKind]]
"""Characters ``[start, end)`` and their kind."""


def episodes_of(
    demo: str,
    queries: Sequence[str],
    answers: Sequence[str],
    demo_kinds: Kinds | None,
    shots: Sequence[Range] | None,
    gold: Any,
    other_query: Any,
    control_tokens: bool,
) -> list[OnEpisode]:
    """Return an episode without an answer for each query; arguments as of ``select_kv``.

    Raises:
        ConfigError: a range is not inside the demo, or the entries of an argument are not one for each query.
    """
    _check_ranges("shots", shots or (), demo)
    _check_ranges("demo_kinds", [(start, end) for start, end, _ in demo_kinds or ()], demo)
    golds, others = _per_query("gold", gold, len(queries)), _per_query("other_query", other_query, len(queries))
    for own in golds:
        _check_ranges("gold", [own] if own is not None else [], demo)
    episodes = []
    for name, text, own_gold, own_other in zip(_names(queries), queries, golds, others, strict=True):
        kinds = guess_kinds(demo, text, answers) if demo_kinds is None else tuple(demo_kinds)
        told = guess_shots(demo, kinds) if shots is None else tuple(shots)
        markup = _markup(demo, text, control_tokens)
        episodes.append(OnEpisode(name, demo, text, "", kinds, own_gold, own_other, told, markup=markup))
    return episodes


def samples_of(lm: LanguageModel, config: Phase2Config, episodes: Sequence[OnEpisode]) -> list[OnSample]:
    """Return the episodes tokenised, and checked against the model's limits.

    The engine also scores the right answer, which nobody knows here: each sample has a stand-in, which is never read.

    Raises:
        DataError: demo and query cannot be told apart, or are too long; the message names the query.
        ConfigError: the prefix has no slot for BOS.
    """
    check_prefix_len(config, _tokenizer(lm))
    samples = [retokenize(lm, episode) for episode in episodes]
    for sample in samples:
        check_sample(sample, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    return samples


def retokenize(lm: LanguageModel, episode: OnEpisode) -> OnSample:
    """Return the sample that ``samples_of`` made of an episode."""
    sample = tokenize_prompt(_tokenizer(lm), episode)
    return replace(sample, answer_token_ids=sample.query_token_ids[-1:])


def query_tokens(lm: LanguageModel, sample: OnSample, query: str) -> tuple[int, ...]:
    """Return the tokens of another query as it follows a sample's demo.

    Raises:
        DataError: it cannot be told apart from the demo, or changes the demo's tokens.
    """
    episode = sample.episode
    markup = _markup(episode.demo_text, query, bool(episode.markup))
    other = replace(episode, sample_id=preview(query, 48), query_text=query, other_query_text=None, markup=markup)
    found = tokenize_prompt(_tokenizer(lm), other)
    if found.demo_token_ids != sample.demo_token_ids:
        raise DataError(f"query {preview(query, 48)} changes the tokens of the demo in front of it; begin it differently")
    return found.query_token_ids


def _tokenizer(lm: LanguageModel) -> SampleTokenizer:
    """Return what texts are tokenised with; made once per model."""
    if "sample tokenizer" not in lm.measured:
        lm.measured["sample tokenizer"] = SampleTokenizer.of(lm.tokenizer)
    made: SampleTokenizer = lm.measured["sample tokenizer"]
    return made


def _names(queries: Sequence[str]) -> list[str]:
    """Return a name for each query that depends on the query alone, so that what is drawn for it does too."""
    seen: Counter[str] = Counter()
    names = []
    for text in queries:
        seen[text] += 1
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        names.append(f"{preview(text, 48)} ({digest}{'' if seen[text] == 1 else f', number {seen[text]}'})")
    return names


def _markup(demo: str, query: str, control_tokens: bool) -> tuple[Range, ...]:
    return ((0, len(demo)), (len(demo), len(demo) + len(query))) if control_tokens else ()


def _per_query(name: str, value: Any, n: int) -> list[Any]:
    """Return an argument for each query: the one that all share, or each one's own."""
    if value is None or isinstance(value, str) or (len(value) == 2 and all(isinstance(edge, int) for edge in value)):
        return [value if value is None or isinstance(value, str) else tuple(value)] * n
    if len(value) != n:
        raise ConfigError(f"select_kv: {name} has {len(value)} entries for {n} queries; give one for each, or one for all")
    return [own if own is None or isinstance(own, str) else tuple(own) for own in value]


def _check_ranges(name: str, ranges: Sequence[Range], demo: str) -> None:
    """Raise ConfigError for a range that is not inside the demo, or begins before the one before it has ended."""
    previous_end = 0
    for start, end in ranges:
        if not previous_end <= start < end <= len(demo):
            raise ConfigError(
                f"select_kv: {name} range [{start}, {end}): ranges ascend without overlap inside the demo's characters "
                f"(0..{len(demo)})"
            )
        previous_end = end
