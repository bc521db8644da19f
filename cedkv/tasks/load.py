"""Load all samples of a run: read or generate them, tokenize them, and check them against the model's limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeVar

from cedkv.config.extensions import TASKS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, DataError, UnusableSample
from cedkv.core.text import plural, preview, sentence
from cedkv.core.values import OffSample, OnEpisode, OnSample
from cedkv.tasks import off_prompts
from cedkv.tasks.answer_tokens import SEVERAL_TOKENS
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.context_use import off_base_use, require_positions, teacher_use
from cedkv.tasks.texts import OffText, SampleTexts, read_sample_texts, shortfalls
from cedkv.tasks.tokenize import SampleTokenizer, tokenize_off, tokenize_on

TextT = TypeVar("TextT", OnEpisode, OffText)
SampleT = TypeVar("SampleT", OnSample, OffSample)
Kind = Literal["ON", "OFF"]
_NAMES: dict[Kind, str] = {"ON": "ON samples", "OFF": "OFF prompts"}
REPEATED = "repeats another sample"
_EXAMPLES, _VALUES = 5, 40
_HOPELESS = 1_000
"""So many samples in a row without a usable one, and no more are looked at: a generator may go on for ever."""


@dataclass(frozen=True)
class Unusable:
    """Samples that were left out for one reason, with the ids of the first of them."""

    kind: Kind
    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass
class Repetitions:
    """Finds samples that repeat an earlier one: n counts samples, and the same one twice is one.

    by: what they have in common, in tokens. places: where samples stand in a user's file, by their ids.
    """

    by: Literal["demo and query", "query", "prompt"]
    places: Mapping[str, str]
    first: dict[tuple[tuple[int, ...], ...], str] = field(default_factory=dict)

    def check(self, sample: OnSample | OffSample) -> None:
        """Raise UnusableSample if the sample repeats one that was checked before."""
        if isinstance(sample, OffSample):
            tokens: tuple[tuple[int, ...], ...] = (sample.token_ids,)
        else:
            tokens = (sample.query_token_ids,) if self.by == "query" else (sample.demo_token_ids, sample.query_token_ids)
        earlier = self.first.setdefault(tokens, sample.sample_id)
        if earlier != sample.sample_id:
            here, there = self._named(sample.sample_id), self._named(earlier)
            raise UnusableSample(
                REPEATED,
                f"sample {here} has the same {self.by} as sample {there}: n counts different samples, and a repeated one would "
                "make every interval too narrow; leave it out",
                f"{self._short(sample.sample_id)} as {self._short(earlier)}",
            )

    def _short(self, sample_id: str) -> str:
        """Return the line or row of a sample, without its file; its id where it is of none."""
        number = self.places.get(sample_id, sample_id).rpartition(":")[2].strip()
        return f"line {number}" if sample_id in self.places and number.isdigit() else number

    def _named(self, sample_id: str) -> str:
        return f"{sample_id} ({self.places[sample_id]})" if sample_id in self.places else sample_id


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
    config: Phase2Config,
    tokenizer: Any,
    max_positions: int,
    vocabulary: int,
    texts: SampleTexts | None = None,
    beyond: Mapping[tuple[str, str], UnusableSample] | None = None,
) -> Samples:
    """Read or generate the samples of a configuration, and leave out unusable ones where ``data.unusable`` says so.

    Args:
        tokenizer: a fast Hugging Face tokenizer (character offsets are needed).
        max_positions: the model's positions; a sample without a prefix must have room in them.
        vocabulary: size of the model's vocabulary; the tokenizer's may be larger.
        texts: as ``read_sample_texts`` returns them; None reads them here.
        beyond: kind and id of samples that are known not to fit the model, and why (``inference.context_window``).

    Raises:
        ConfigError: the prefix has no slot for the BOS token.
        DataError: samples that cannot be used, all of them counted by reason; none that can; two with one id.
    """
    data, sizes = config.data, config.eval
    texts = texts or read_sample_texts(config)
    made = SampleTokenizer.of(tokenizer, config.model.template_kwargs, data.answer, data.off_length)
    check_prefix_len(config, made)
    skip = data.unusable == "skip"

    def off_sample(prompt: OffText) -> OffSample:
        sample = tokenize_off(made, prompt.sample_id, prompt.text, prompt.document)
        require_positions(off_base_use(sample, sizes.off_tokens), max_positions)
        _check_vocabulary(sample.sample_id, sample.token_ids, tokenizer, vocabulary)
        return sample

    def on_sample(episode: OnEpisode) -> OnSample:
        if data.format == "chat" and not episode.markup:
            raise DataError(
                f"sample {episode.sample_id}: data.format = chat, but data.task = {data.task}, or the file, gives its demo as "
                "finished text; leave out data.format, or give rows (data.fields)"
            )
        sample = tokenize_on(made, episode)
        check_sample(sample, tokenizer, max_positions, vocabulary)
        return sample

    off_places = {prompt.sample_id: prompt.place for prompt in texts.off if prompt.place}
    beyond = beyond or {}
    off_checks = Repetitions("prompt", off_places), beyond
    off, off_unusable = _usable("OFF", texts.off, sizes.off_samples, off_sample, skip, *off_checks)
    request = TaskRequest(sizes.on_samples, config.seed, data, tokenizer, _words(off), config.model.template_kwargs)
    with TASKS.errors_named(data.task):
        on_source = texts.on.source(request)
    on_checks = Repetitions(texts.on.repeated_by, texts.on_places), beyond
    on, on_unusable = _usable("ON", _episodes(texts, request), sizes.on_samples, on_sample, skip, *on_checks)
    _check_first_tokens(data.answer, on)
    off_source = data.off_path or f"off_prompts(seed={config.seed})"
    notes = (*texts.notes, *shortfalls(config, data.on_path or on_source, len(on), len(off)), *_written_otherwise(on))
    return Samples(tuple(on), tuple(off), on_source, off_source, notes, (*on_unusable, *off_unusable))


def _episodes(texts: SampleTexts, request: TaskRequest) -> Iterator[OnEpisode]:
    """Yield the episodes of a task; an error of another package's task names it."""
    with TASKS.errors_named(request.data.task):
        episodes = iter(texts.on.episodes(request))
    while True:
        with TASKS.errors_named(request.data.task):
            episode = next(episodes, None)
        if episode is None:
            return
        yield episode


def _usable(
    kind: Kind,
    texts: Iterable[TextT],
    n: int,
    sample_of: Callable[[TextT], SampleT],
    skip: bool,
    repetitions: Repetitions,
    beyond: Mapping[tuple[str, str], UnusableSample],
) -> tuple[list[SampleT], list[Unusable]]:
    """Return the first ``n`` usable samples, fewer where there are no more, and what was left out.

    Raises:
        DataError: some of the first ``n`` cannot be used, and they are not to be skipped; none can; two have one id.
    """
    samples, errors, seen, in_vain = list[SampleT](), list[tuple[str, UnusableSample]](), set[str](), 0
    for text in texts if skip else islice(texts, n):
        if text.sample_id in seen:
            raise DataError(f"two {kind} samples have the id {preview(text.sample_id)}; give every sample its own id")
        seen.add(text.sample_id)
        try:
            if (kind, text.sample_id) in beyond:
                raise beyond[kind, text.sample_id]
            sample = sample_of(text)
            repetitions.check(sample)
            samples.append(sample)
            in_vain = 0
        except UnusableSample as error:
            errors.append((text.sample_id, error))
            in_vain += 1
        if len(samples) == n or in_vain >= max(n, _HOPELESS):
            break
    unusable = [
        Unusable(kind, reason, count, tuple([name for name, error in errors if error.reason == reason][:_EXAMPLES]))
        for reason, count in Counter(error.reason for _, error in errors).most_common()
    ]
    if errors and (not samples or not skip):
        raise _error_of(kind, len(samples), unusable, [error for _, error in errors], skip)
    if not samples:
        raise DataError(f"there are no {_NAMES[kind]}; give a file with some, or leave the file out")
    return samples, unusable


def _error_of(kind: Kind, usable: int, unusable: Sequence[Unusable], errors: Sequence[UnusableSample], skip: bool) -> DataError:
    """Return the error that counts all unusable samples by reason, and lists what is wrong with them."""
    count = sum(each.count for each in unusable)
    reasons = ", ".join(
        f"{each.count} x {each.reason} ({', '.join(map(preview, each.examples))}{', ...' if each.count > _EXAMPLES else ''})"
        for each in unusable
    )
    remedies = []
    if any(each.reason == SEVERAL_TOKENS for each in unusable):
        remedies.append("data.answer=whole or first takes answers of several tokens; data.verbalizer gives labels words")
    if usable and not skip:
        remedies.append("data.unusable=skip leaves such samples out, and counts them")
    remedy = f". {'; '.join(remedies)}" if remedies else ""
    values = [(each.reason, _values(each.reason, errors)) for each in unusable]
    listed = "".join(f" {sentence(reason)}: {found}." for reason, found in values if found)
    said = f"{count} of {count + usable} {_NAMES[kind]} cannot be used: {reasons}.{listed}"
    return DataError(f"{said} The first: {errors[0]}{remedy}")


def _values(reason: str, errors: Sequence[UnusableSample]) -> str:
    """Return what is wrong with the samples of a reason: each value once, with the number of samples where they are several."""
    values = Counter(error.value for error in errors if error.reason == reason and error.value is not None)
    shown = [value if times == 1 else f"{value} ({times} times)" for value, times in values.most_common(_VALUES)]
    return ", ".join([*shown, *([f"and {len(values) - _VALUES} more"] if len(values) > _VALUES else [])])


def _written_otherwise(on: Sequence[OnSample]) -> list[str]:
    """Return the note on samples whose demo has their answer's text, and not as the tokens that are asked for."""
    names = [sample.sample_id for sample in on if not sample.answer_as_shown]
    if not names:
        return []
    first = next(sample for sample in on if not sample.answer_as_shown)
    return [
        f"{plural(len(names), 'sample')} ({', '.join(map(preview, names[:_EXAMPLES]))}{', ...' * (len(names) > _EXAMPLES)}): "
        f"the demo has the answer's text only as other tokens than those asked for (other spaces, case or neighbours), in the "
        f"first of them for {preview(first.episode.answer_text)}; a model that answers as the demo has it counts as wrong"
    ]


def check_sample(sample: OnSample, tokenizer: Any, max_positions: int, vocabulary: int) -> None:
    """Raise UnusableSample if a sample is longer than the model's context, or has a token beyond its vocabulary."""
    ids = (*sample.teacher_ids, *sample.answer_token_ids)
    require_positions(teacher_use(sample), max_positions)
    _check_vocabulary(sample.sample_id, (*ids, *(sample.other_query_ids or ())), tokenizer, vocabulary)


def check_prefix_len(config: Phase2Config, made: SampleTokenizer) -> None:
    """Raise ConfigError if spans and sinks leave no slot for BOS, which every prefix keeps."""
    select = config.select
    need = select.span_budget * select.span_len + select.keep_sink + len(made.bos)
    if need > config.prefix_len:
        raise ConfigError(
            f"this tokenizer adds BOS, which every prefix keeps: span_budget x span_len + keep_sink + 1 = {need} tokens "
            f"cannot fit prefix_len = {config.prefix_len}; raise prefix_len to {need}, or lower one of the others"
        )


def _check_first_tokens(answer: str, on: Sequence[OnSample]) -> None:
    """Raise DataError if only first tokens count and tell no two answers apart: any arm that knows the form would be right."""
    texts = {sample.episode.answer_text for sample in on}
    if answer == "first" and len(texts) > 1 and len({sample.answer_token_ids for sample in on}) == 1:
        raise DataError(
            f"data.answer = first: the {len(texts)} different answers of {len(on)} ON samples all begin with the same token: "
            "it tells none of them apart; use data.answer=whole, or give labels words (data.verbalizer)"
        )


def _check_vocabulary(sample_id: str, ids: Sequence[int], tokenizer: Any, vocabulary: int) -> None:
    """Raise UnusableSample if a sample has a token beyond the model's vocabulary."""
    if max(ids) >= vocabulary:
        raise UnusableSample(
            "token beyond the model's vocabulary",
            f"sample {sample_id} has the token {tokenizer.convert_ids_to_tokens(max(ids))!r} ({max(ids)}), the model's "
            f"vocabulary has {vocabulary} tokens; leave the token out of the text",
        )


def _words(off: Sequence[OffSample]) -> frozenset[str]:
    """Return every lower-case word of the OFF prompts, the built-in ones included whether they are used or not."""
    return off_prompts.words().union(*(re.findall(r"[a-z]+", sample.prompt_text.lower()) for sample in off))
