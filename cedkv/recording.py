"""Make the records of a unit (``cedkv.records``) from what its arms answered, selected and were judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cedkv.core.values import Candidate, Evidence, OffSample, OnSample, Placement, Record, Selection
from cedkv.inference.answers import Answers
from cedkv.inference.distributions import among_labels, kl
from cedkv.inference.off import OffAnswers, OffBase
from cedkv.inference.quality import GoldMass, Quality, gold_coverage
from cedkv.kv.transfers import to_lists
from cedkv.models.tokenizer import token_text
from cedkv.records import HeadsRecord, OffRecord, OnRecord, PlumbingRecord, PrefixRecord, ReproRecord, SelectionRecord, TopToken
from cedkv.selectors.base import attention_score


def answers(
    arms: dict[str, Answers], randoms: Sequence[Answers], samples: Sequence[OnSample], tokenizer: Any, topk: int
) -> list[Record]:
    """Return what B samples answer under every arm: one part of their records each.

    Args:
        arms: base, teacher, select -> what the B samples answer.
        randoms: the same for each random trial.
        samples: the B samples.
        topk: tokens of each arm's distribution to keep.
    """
    base, teacher, select = (arms[name].logprobs for name in ("base", "teacher", "select"))
    measured: dict[str, torch.Tensor] = {}  # (B,), and of random trials (B, trials)
    for name, arm in arms.items():
        measured[f"token_{name}"] = arm.logprobs.argmax(dim=1)
        measured[f"correct_{name}"] = arm.correct
        measured[f"answer_logprob_{name}"] = arm.answer
    measured |= {
        "token_random": _by_sample([trial.logprobs.argmax(dim=1) for trial in randoms], base),
        "correct_random": _by_sample([trial.correct for trial in randoms], base),
        "answer_logprob_random": _by_sample([trial.answer for trial in randoms], base),
        "kl_base_teacher": kl(base, teacher),
        "kl_select_teacher": kl(select, teacher),
        "kl_random_teacher": _by_sample([kl(trial.logprobs, teacher) for trial in randoms], base),
        "kl_random_base": _by_sample([kl(trial.logprobs, base) for trial in randoms], base),
        "phase2_delta_on_select": kl(select, base),
        "phase2_answer_logprob_gain": arms["select"].answer - arms["base"].answer,
    }
    tops = {
        (name, part): values
        for name, arm in arms.items()
        for part, values in zip(("logprob", "token"), arm.logprobs.topk(min(topk, arm.logprobs.shape[1]), dim=1), strict=True)
    }
    everyone = [arm.logprobs for arm in (*arms.values(), *randoms)]
    of_labels = {
        (row, part): values
        for row, sample in enumerate(samples)
        if sample.label_token_ids
        for part, values in _among_labels([logprobs[row] for logprobs in everyone], list(arms).index("teacher"), sample).items()
    }
    found: dict[Any, list[Any]] = to_lists({**measured, **tops, **of_labels})
    columns = {name: found[name] for name in measured}
    columns["rel_kl_to_teacher"] = [
        student / (alone + 1e-6)
        for student, alone in zip(columns["kl_select_teacher"], columns["kl_base_teacher"], strict=True)
    ]
    return [
        {
            **{name: values[row] for name, values in columns.items()},
            **(_labels_record(sample, list(arms), found[row, "best"], found[row, "kl"]) if sample.label_token_ids else {}),
            "topk": {name: _top(found[name, "token"][row], found[name, "logprob"][row], tokenizer) for name in arms},
        }
        for row, sample in enumerate(samples)
    ]


def _among_labels(everyone: Sequence[torch.Tensor], teacher: int, sample: OnSample) -> dict[str, torch.Tensor]:
    """Return what one sample answers among its labels under A arms and trials: ``best``, the index of the most probable label,
    (A,), and ``kl``, KL(arm || teacher) among them, (A,).

    Args:
        everyone: (vocabulary,) log-probabilities of each arm, then of each random trial.
        teacher: which of them is the teacher's.
    """
    logprobs = torch.stack([among_labels(arm, sample.label_token_ids) for arm in everyone])  # (arms and trials, labels)
    return {"best": logprobs.argmax(dim=1), "kl": kl(logprobs, logprobs[teacher])}


def _labels_record(sample: OnSample, arms: Sequence[str], best: Sequence[int], kls: Sequence[float]) -> Record:
    """Return the part of one sample's record that is of its labels; ``best`` and ``kls`` as of ``_among_labels``."""
    right = [sample.label_token_ids[label] == sample.answer_token_id for label in best]
    record: Record = {"kl_random_teacher_labels": kls[len(arms) :], "correct_random_labels": right[len(arms) :]}
    for i, arm in enumerate(arms):
        record[f"correct_{arm}_labels"] = right[i]
        if arm != "teacher":
            record[f"kl_{arm}_teacher_labels"] = kls[i]
    return record


def on_record(
    sample: OnSample,
    answered: Record,
    evidence: Evidence,
    selection: Selection,
    randoms: Sequence[Selection],
    span_len: int,
    quality: Quality,
) -> OnRecord:
    """Return the record of one ON sample; ``answered`` is its part of ``answers``, ``randoms`` one selection per trial."""
    attention = [attention_score(Candidate(span.start, span.end), evidence) for span in selection.spans]
    record: Record = {
        "type": "sample",
        "kind": "on",
        "sample_id": sample.sample_id,
        "answer_token_id": sample.answer_token_id,
        **answered,
        "phase2_selection_score_attention": float(np.mean(attention)),
        "selector_score": float(np.mean([span.score for span in selection.spans])),
    }
    if evidence.causal_drop is not None:
        drops = evidence.causal_drop
        chosen = [drops[span.start] for span in selection.spans if span.start in drops]
        record["phase2_selection_score_causal_drop"] = float(np.mean(chosen)) if chosen else None
        record["candidate_causal_drop"] = [drops[start] for start in sorted(drops)]
        record["candidate_attention"] = [
            attention_score(Candidate(start, start + span_len), evidence) for start in sorted(drops)
        ]
    if sample.gold_depth is not None:
        record["gold_depth"] = sample.gold_depth
    record["random_same"] = [random.kept_tokens == selection.kept_tokens for random in randoms]
    judged = {"gold_coverage": quality.gold_coverage, "lds": quality.lds, "comprehensiveness": quality.comprehensiveness}
    record |= {name: value for name, value in judged.items() if value is not None}
    if sample.gold_tokens is not None and randoms:
        record["gold_coverage_random"] = [gold_coverage(sample, random) for random in randoms]
    return record  # type: ignore[return-value]  # put together from columns


def off_records(
    prompts: Sequence[OffSample], states_of: Sequence[str], base: OffBase, select: OffAnswers, deltas: Sequence[float]
) -> list[OffRecord]:
    """Return the records of N OFF prompts.

    Args:
        states_of: the ON sample whose prefix each runs under.
        base, select: what they are answered alone, and under the prefixes.
        deltas: KL(select || base) of the token after the prompt, in nats.
    """
    found = to_lists(
        {
            "alone": base.logprobs.argmax(dim=1),
            "under": select.logprobs.argmax(dim=1),
            "entropy": base.entropy(),
            "kl": select.kl,
            "same": select.same,
        }
    )
    alone, under, entropies, kls, same = (found[name] for name in ("alone", "under", "entropy", "kl", "same"))
    return [
        {
            "type": "sample",
            "kind": "off",
            "sample_id": prompt.sample_id,
            "state_of": states_of[i],
            "token_base": alone[i],
            "token_select": under[i],
            "same_token": alone[i] == under[i],
            "phase2_delta_off_select": deltas[i],
            "base_entropy": entropies[i],
            "further_token_ids": list(base.tokens[i]),
            "further_kl": kls[i][: len(base.tokens[i])],
            "further_same": same[i][: len(base.tokens[i])],
            "prompt_text": prompt.prompt_text,
            "token_ids": list(prompt.token_ids),
        }
        for i, prompt in enumerate(prompts)
    ]


def selection_record(
    sample: OnSample,
    owner: OnSample,
    evidence: Evidence,
    selection: Selection,
    placement: Placement,
    randoms: Sequence[tuple[Selection, Placement]],
    quality: Quality,
) -> SelectionRecord:
    """Return what was selected for one ON sample; ``owner`` is the sample whose demo the prefix is of."""
    record: Record = {
        "type": "selection",
        "sample_id": sample.sample_id,
        "demo_text": sample.episode.demo_text,
        "query_text": sample.episode.query_text,
        "answer_text": sample.episode.answer_text,
        "demo_token_ids": list(sample.demo_token_ids),
        "query_token_ids": list(sample.query_token_ids),
        "answer_token_id": sample.answer_token_id,
        "answer_token_ids": list(sample.answer_token_ids),
        "token_kinds": list(sample.token_kinds),
        "label_token_ids": list(sample.label_token_ids),
        "scores": (evidence.attention if quality.worth is None else quality.worth).tolist(),
        "scores_of": "attention" if quality.worth is None else "selector",
        "prefix_of": owner.sample_id,
        **_prefix(selection, placement),
        "random": [{"trial": trial, **_prefix(*prefix)} for trial, prefix in enumerate(randoms)],
    }
    if sample.gold_tokens is not None:
        record["gold_tokens"] = list(sample.gold_tokens)
    if quality.masked is not None:
        record["lds_visible"] = [np.flatnonzero(mask).tolist() for mask in quality.masked.visible]
        record["lds_log_odds"] = quality.masked.log_odds.tolist()
        record["lds_token_id"] = quality.masked.token_id
    return record  # type: ignore[return-value]  # put together from parts


def heads_record(mass: GoldMass) -> HeadsRecord:
    """Return a unit's attention to gold tokens."""
    return {
        "type": "heads",
        "window": mass.rows.window,
        "layers": list(mass.layers),
        "total": mass.total.numpy().round(6).tolist(),
        "n": mass.n,
    }


def plumbing_records(names: Sequence[str], observed: Mapping[str, Sequence[float | None]]) -> list[PlumbingRecord]:
    """Return Gate A's observations, one record per sample, with the values that were observed on it."""
    return [
        {
            "type": "plumbing",
            "sample_id": name,
            **{observation: values[row] for observation, values in observed.items() if values[row] is not None},
        }
        for row, name in enumerate(names)
    ]


def repro_records(repeat: int, samples: Sequence[OnSample], select: Answers) -> list[ReproRecord]:
    """Return the select arm of B samples in a repetition."""
    found = to_lists({"token": select.logprobs.argmax(dim=1), "correct": select.correct, "answer": select.answer})
    return [
        {
            "type": "repro",
            "repeat": repeat,
            "sample_id": sample.sample_id,
            "token_select": token,
            "correct_select": correct,
            "answer_logprob_select": answer,
        }
        for sample, token, correct, answer in zip(samples, found["token"], found["correct"], found["answer"], strict=True)
    ]


def _prefix(selection: Selection, placement: Placement) -> PrefixRecord:
    return {
        "spans": [{"start": s.start, "end": s.end, "score": s.score} for s in selection.spans],
        "kept_tokens": list(placement.kept_tokens),
        "key_positions": list(placement.key_positions),
        "query_start": placement.query_start,
        "prefix_slots": placement.slots,
    }


def _by_sample(by_trial: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return one (B,) tensor per random trial as (B, trials); without trials (B, 0), B as in ``like``."""
    return torch.stack(list(by_trial), dim=1) if by_trial else like.new_empty(len(like), 0)


def _top(tokens: Sequence[int], logprobs: Sequence[float], tokenizer: Any) -> list[TopToken]:
    """Return the most probable tokens of a row as they are recorded."""
    return [
        {"token_id": token, "text": token_text(tokenizer, token), "logprob": value}
        for token, value in zip(tokens, logprobs, strict=True)
    ]
