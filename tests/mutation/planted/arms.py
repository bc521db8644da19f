"""Faults in what arms answer and in how it is recorded: answers of another arm, sample or batch, or in another unit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cedkv.inference.answers import AnswerReader, Answers
from tests.mutation.planted import Patch
from tests.support import patch_points as points


def random_answers_are_select_s(patch: Patch) -> None:
    first: dict[int, Any] = {}

    def remembered(real: Any, batch: Any, choice: Any, rows: Any, prefix: Any) -> Answers:
        of_samples = [row % len(batch.samples) for row in rows]  # which repeat in several trials
        return first.setdefault(id(batch), real(batch, choice, rows, prefix)).rows(of_samples)

    points.ANSWER.wrap(patch, remembered)


def random_spans_are_select_s(patch: Patch) -> None:
    def selected(real: Any, batch: Any, config: Any, evidences: Any, mode: str, purpose: str, trial: int) -> Any:
        return real(batch, config, evidences, config.select.mode, "select", 0)

    points.CHOOSE.wrap(patch, selected)


def base_answers_are_select_s(patch: Patch) -> None:
    """Base has the prefix as well."""

    def mixed_up(real: Any, by_arm: dict[str, Answers], *rest: Any) -> Any:
        return real({**by_arm, "base": by_arm["select"]}, *rest)

    points.ANSWERS.wrap(patch, mixed_up)


def select_and_random_swapped(patch: Patch) -> None:
    def mixed_up(real: Any, by_arm: dict[str, Answers], randoms: list[Answers], *rest: Any) -> Any:
        return real({**by_arm, "select": randoms[0]}, [by_arm["select"], *randoms[1:]], *rest)

    points.ANSWERS.wrap(patch, mixed_up)


def select_answers_of_the_next_sample(patch: Patch) -> None:
    def mixed_up(real: Any, by_arm: dict[str, Answers], randoms: Any, samples: Any, *rest: Any) -> Any:
        of_next = by_arm["select"].logprobs.roll(-1, dims=0)
        read = AnswerReader([sample.answer_token_ids[:1] for sample in samples]).read(of_next)
        return real({**by_arm, "select": read}, randoms, samples, *rest)

    points.ANSWERS.wrap(patch, mixed_up)


def select_at_another_temperature(patch: Patch) -> None:
    """Greedy tokens stay what they are."""

    def flatter(real: Any, by_arm: dict[str, Answers], *rest: Any) -> Any:
        logprobs = (0.01 * by_arm["select"].logprobs).log_softmax(dim=-1)
        return real({**by_arm, "select": by_arm["select"]._replace(logprobs=logprobs)}, *rest)

    points.ANSWERS.wrap(patch, flatter)


def all_arms_at_another_temperature(patch: Patch) -> None:
    """Every distribution of the pipeline alike; only the model left alone is itself."""
    points.LOG_SOFTMAX.wrap(patch, lambda real, logits: real(0.9 * logits))


def a_query_token_for_the_answer(patch: Patch) -> None:
    def wrong(real: Any, lm: Any, configs: Any, samples: Any, *rest: Any, **named: Any) -> Any:
        changed = [replace(sample, answer_token_ids=(sample.query_token_ids[0],)) for sample in samples]
        return real(lm, configs, changed, *rest, **named)

    points.READ_SAMPLES.wrap(patch, wrong)


def kl_as_a_mean_over_the_vocabulary(patch: Patch) -> None:
    points.RECORDED_KL.wrap(patch, lambda real, logprobs, reference: real(logprobs, reference) / logprobs.shape[-1])


def teacher_counted_as_base(patch: Patch) -> None:
    """Whether the teacher is right is taken from base; every distribution stays what it is."""

    def mixed_up(real: Any, *arguments: Any) -> Any:
        return [{**record, "correct_teacher": record["correct_base"]} for record in real(*arguments)]

    points.ANSWERS.wrap(patch, mixed_up)


def select_counted_as_wrong(patch: Patch) -> None:
    """In the run and in its repetitions alike; every distribution stays what it is."""
    wrong = {"correct_select": False}
    points.ANSWERS.wrap(patch, lambda real, *arguments: [{**record, **wrong} for record in real(*arguments)])
    points.REPRO_RECORDS.wrap(patch, lambda real, *arguments: [{**record, **wrong} for record in real(*arguments)])


def entropy_as_a_mean_over_the_vocabulary(patch: Patch) -> None:
    def smaller(real: Any, batch: Any, *rest: Any) -> Any:
        tokens = batch.lm.vocabulary
        return [{**record, "base_entropy": record["base_entropy"] / tokens} for record in real(batch, *rest)]

    points.OFF_RECORDS.wrap(patch, smaller)


def off_kl_in_bits(patch: Patch) -> None:
    points.RECORDED_OFF_KL.wrap(patch, lambda real, *logprobs: real(*logprobs) / math.log(2))


def off_prompts_compared_with_the_next_one_alone(patch: Patch) -> None:
    """KL(an OFF prompt under a prefix || another OFF prompt alone); Gate A looks at OFF prompts under a prefix only."""

    def shifted(real: Any, *arguments: Any) -> Any:
        base = real(*arguments)
        return replace(base, logprobs=base.logprobs.roll(-1, dims=0))

    points.OFF_BASE.wrap(patch, shifted)


def off_answers_compared_one_token_late(patch: Patch) -> None:
    """KL(after a token of base's answer under a prefix || after the next one alone)."""

    def late(real: Any, *arguments: Any) -> Any:
        base = real(*arguments)
        return replace(base, further=base.further.roll(-1, dims=1))

    points.OFF_BASE.wrap(patch, late)


def answers_given_one_position_late(patch: Patch) -> None:
    """What follows a prompt in its pass leaves a position out, in every arm alike."""

    def late(real: Any, rows: Any, device: Any, given: Any = ()) -> Any:
        ids, mask, positions = real(rows, device, given)
        after = max(map(len, given), default=0)
        positions[:, positions.shape[1] - after :] += 1
        return ids, mask, positions

    points.LEFT_PADDED_ARMS.wrap(patch, late)


def answers_given_backwards(patch: Patch) -> None:
    """Tokens that follow a prompt are given last one first, under a prefix only."""

    def backwards(real: Any, lm: Any, rows: Any, prefix: Any, layers: Any, given: Any = ()) -> Any:
        return real(lm, rows, prefix, layers, [tuple(tokens)[::-1] for tokens in given])

    points.LAST_LOGITS.wrap(patch, backwards)


def off_prompts_under_another_state(patch: Patch) -> None:
    def rotated(real: Any, students: Any, off: Any, *rest: Any) -> Any:
        return real(students, replace(off, owners=off.owners[1:] + off.owners[:1]), *rest)

    points.OFF_PROMPTS.wrap(patch, rotated)


def off_prompts_of_later_units_under_another_state(patch: Patch) -> None:
    """As ``off_prompts_under_another_state``, in units behind those on whose samples Gate A is measured."""
    first: list[Any] = []

    def rotated(real: Any, students: Any, off: Any, *rest: Any) -> Any:
        first.append(students.batch)
        moved = off if students.batch is first[0] else replace(off, owners=off.owners[1:] + off.owners[:1])
        return real(students, moved, *rest)

    points.OFF_PROMPTS.wrap(patch, rotated)


def a_long_off_prompt_turns_those_beside_it(patch: Patch) -> None:
    """Behind a prefix, OFF prompts of different lengths stand a position late where they share a pass."""

    def turned(real: Any, lm: Any, rows: Any, prefix: Any, layers: Any, given: Any = ()) -> Any:
        lengths = [len(row) for row in rows]
        if prefix is not None and len(set(lengths)) > 1 and any(map(len, given)):
            prefix = replace(prefix, query_start=prefix.query_start + 1)
        return real(lm, rows, prefix, layers, given)

    points.LAST_LOGITS.wrap(patch, turned)


def state_of_an_earlier_batch(patch: Patch) -> None:
    """Repetitions get the prefixes of the first one with as many rows: answers depend on which samples were together before."""
    first: dict[int, Any] = {}

    def stale(real: Any, students: Any, choice: Any) -> Any:
        made, repeated = real(students, choice), not students.chosen[0].randoms
        return first.setdefault(len(students.batch.samples), made) if repeated else made

    points.SELECTED.wrap(patch, stale)
