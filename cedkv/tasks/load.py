"""Load all samples of a run: read or generate them, tokenize them, and check them against the model's limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from cedkv.config.extensions import TASKS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.text import preview
from cedkv.core.values import OffSample, OnSample
from cedkv.tasks import off_prompts
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.texts import SampleTexts, read_sample_texts, shortfalls
from cedkv.tasks.tokenize import tokenize_off, tokenize_on


@dataclass(frozen=True)
class Unusable:
    """Samples that were left out for one reason, with the ids of the first of them."""

    kind: Literal["ON", "OFF"]
    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """The ON samples and OFF prompts of a run, in their order, and the source of each kind for reports.

    notes: what a reader of the run should know about its samples, a sentence each: that a file is shorter than asked for.
    unusable: what was left out (``data.unusable``).
    """

    on: tuple[OnSample, ...]
    off: tuple[OffSample, ...]
    on_source: str
    off_source: str
    notes: tuple[str, ...] = ()
    unusable: tuple[Unusable, ...] = ()


def load_samples(
    config: Phase2Config, tokenizer: Any, max_positions: int, vocabulary: int, texts: SampleTexts | None = None
) -> Samples:
    """Read or generate the samples of a configuration.

    Args:
        tokenizer: a fast Hugging Face tokenizer (character offsets are needed).
        max_positions: the model's longest sequence, in tokens.
        vocabulary: size of the model's vocabulary; the tokenizer's may be larger.
        texts: as ``read_sample_texts`` returns them; None reads them here.

    Raises:
        ConfigError: the prefix has no slot for the BOS token.
        DataError: a file or sample that cannot be used; the message names it.
    """
    data, sizes = config.data, config.eval
    texts = texts or read_sample_texts(config)
    off = tuple(tokenize_off(tokenizer, prompt.sample_id, prompt.text) for prompt in texts.off[: sizes.off_samples])
    request = TaskRequest(sizes.on_samples, config.seed, data, tokenizer, _words(off), config.model.template_kwargs)
    with TASKS.errors_named(data.task):
        episodes, on_source = list(islice(texts.on.episodes(request), sizes.on_samples)), texts.on.source(request)
    if not episodes:
        raise DataError(f"data.task = {data.task} gives no episode")
    on = tuple(tokenize_on(tokenizer, episode) for episode in episodes)
    _check_prefix_len(config, on)
    _check_positions(on, off, config.prefix_len, max_positions)
    _check_vocabulary(on, off, tokenizer, vocabulary)
    for kind, samples in (("ON", on), ("OFF", off)):
        ids = [s.sample_id for s in samples]
        repeated = (
            next((sample_id for sample_id in ids if ids.count(sample_id) > 1), None) if len(set(ids)) < len(ids) else None
        )
        if repeated is not None:
            raise DataError(f"two {kind} samples have the id {preview(repeated)}; give every sample its own id")
    off_source = data.off_path or f"off_prompts(seed={config.seed})"
    notes = (*texts.notes, *shortfalls(config, data.on_path or on_source, len(on), len(off)))
    return Samples(on, off, on_source, off_source, notes)


def _check_prefix_len(config: Phase2Config, on: Sequence[OnSample]) -> None:
    """Raise ConfigError if spans and sinks leave no slot for BOS, which every prefix keeps."""
    select = config.select
    need = select.span_budget * select.span_len + select.keep_sink + int(on[0].has_bos)
    if need > config.prefix_len:
        raise ConfigError(
            f"this tokenizer adds BOS, which every prefix keeps: span_budget x span_len + keep_sink + 1 = {need} tokens "
            f"cannot fit prefix_len = {config.prefix_len}; raise prefix_len to {need}, or lower one of the others"
        )


def _check_positions(on: Sequence[OnSample], off: Sequence[OffSample], prefix_len: int, max_positions: int) -> None:
    """Raise DataError if a sequence is longer than the model's."""
    lengths = [(s.sample_id, len(s.teacher_ids)) for s in on]
    lengths += [(s.sample_id, len(s.token_ids) + prefix_len) for s in off]
    for sample_id, length in lengths:
        if length > max_positions:
            raise DataError(
                f"sample {sample_id} needs {length} positions, the model has {max_positions}: logits beyond them mean "
                "nothing; shorten the text, or lower data.pairs or prefix_len"
            )


def _check_vocabulary(on: Sequence[OnSample], off: Sequence[OffSample], tokenizer: Any, vocabulary: int) -> None:
    """Raise DataError if a sample has a token beyond the model's vocabulary."""
    token_ids = [(s.sample_id, (*s.teacher_ids, *(s.other_query_ids or ()), s.answer_token_id)) for s in on]
    token_ids += [(s.sample_id, tuple(s.token_ids)) for s in off]
    for sample_id, ids in token_ids:
        if max(ids) >= vocabulary:
            raise DataError(
                f"sample {sample_id} has the token {tokenizer.convert_ids_to_tokens(max(ids))!r} ({max(ids)}), the model's "
                f"vocabulary has {vocabulary} tokens; leave the token out of the text"
            )


def _words(off: tuple[OffSample, ...]) -> frozenset[str]:
    """Return every lower-case word of the OFF prompts, the built-in ones included whether they are used or not."""
    return off_prompts.words().union(*(re.findall(r"[a-z]+", sample.prompt_text.lower()) for sample in off))
