"""What a unit of work leaves behind: plain records, one a sample, from which every figure is computed.

Names are those of the tables and of ``metrics.jsonl``; KL in nats, log-probabilities natural.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cedkv.core.values import Candidate, Evidence, OffSample, OnSample, Placement, Record, Selection
from cedkv.inference.forward import kl
from cedkv.models.tokenizer import token_text
from cedkv.selectors.base import attention_score


def answers(
    arms: dict[str, torch.Tensor], randoms: Sequence[torch.Tensor], wanted: Sequence[int], tokenizer: Any, topk: int
) -> list[Record]:
    """What B samples answer under every arm: one part of their records each.

    Args:
        arms: base, teacher, select -> (B, vocabulary) log-probabilities.
        randoms: the same for each random trial.
        wanted: the B answers' tokens.
        topk: tokens of each arm's distribution to keep.
    """
    base, teacher, select = arms["base"], arms["teacher"], arms["select"]
    at = torch.tensor(wanted, device=base.device)
    columns: dict[str, list[Any]] = {}
    for name, logprobs in arms.items():
        greedy = logprobs.argmax(dim=1)
        columns[f"token_{name}"] = greedy.tolist()
        columns[f"correct_{name}"] = (greedy == at).tolist()
        columns[f"answer_logprob_{name}"] = _at(logprobs, at).tolist()
    tokens = [logprobs.argmax(dim=1) for logprobs in randoms]
    columns |= {
        "token_random": _by_sample([found.tolist() for found in tokens], len(wanted)),
        "correct_random": _by_sample([(found == at).tolist() for found in tokens], len(wanted)),
        "answer_logprob_random": _by_sample([_at(logprobs, at).tolist() for logprobs in randoms], len(wanted)),
        "kl_base_teacher": kl(base, teacher).tolist(),
        "kl_select_teacher": kl(select, teacher).tolist(),
        "kl_random_teacher": _by_sample([kl(logprobs, teacher).tolist() for logprobs in randoms], len(wanted)),
        "kl_random_base": _by_sample([kl(logprobs, base).tolist() for logprobs in randoms], len(wanted)),
        "phase2_delta_on_select": kl(select, base).tolist(),
        "phase2_answer_logprob_gain": (_at(select, at) - _at(base, at)).tolist(),
    }
    columns["rel_kl_to_teacher"] = [
        student / (alone + 1e-6)
        for student, alone in zip(columns["kl_select_teacher"], columns["kl_base_teacher"], strict=True)
    ]
    tops = {name: _top(logprobs, tokenizer, topk) for name, logprobs in arms.items()}
    return [
        {**{name: values[row] for name, values in columns.items()}, "topk": {name: top[row] for name, top in tops.items()}}
        for row in range(len(wanted))
    ]


def on_record(sample: OnSample, measured: Record, evidence: Evidence, selection: Selection, span_len: int) -> Record:
    """One ON sample under every arm; ``measured`` is its part of ``answers``."""
    attention = [attention_score(Candidate(span.start, span.end), evidence) for span in selection.spans]
    record: Record = {
        "type": "sample",
        "kind": "on",
        "sample_id": sample.sample_id,
        "answer_token_id": sample.answer_token_id,
        **measured,
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
    return record


def off_record(sample: OffSample, state_of: str, alone: int, under: int, delta: float) -> Record:
    """One OFF prompt: its greedy token alone (base) and under a state (select), and KL(select || base) in nats."""
    return {
        "type": "sample",
        "kind": "off",
        "sample_id": sample.sample_id,
        "state_of": state_of,
        "token_base": alone,
        "token_select": under,
        "same_token": alone == under,
        "phase2_delta_off_select": delta,
        "prompt_text": sample.prompt_text,
        "token_ids": list(sample.token_ids),
    }


def selection_record(
    sample: OnSample,
    owner: OnSample,
    evidence: Evidence,
    selection: Selection,
    placement: Placement,
    randoms: Sequence[tuple[Selection, Placement]],
) -> Record:
    """All an outside program needs to build this sample's prefixes again with plain transformers.

    ``prefix_of`` names the sample whose demo the kept tokens are of: this one, but for ``wrong_demo``.
    """
    return {
        "type": "selection",
        "sample_id": sample.sample_id,
        "demo_text": sample.episode.demo_text,
        "query_text": sample.episode.query_text,
        "answer_text": sample.episode.answer_text,
        "demo_token_ids": list(sample.demo_token_ids),
        "query_token_ids": list(sample.query_token_ids),
        "answer_token_id": sample.answer_token_id,
        "token_kinds": list(sample.token_kinds),
        "scores": evidence.attention.tolist(),
        "prefix_of": owner.sample_id,
        **_state(selection, placement),
        "random": [{"trial": trial, **_state(*state)} for trial, state in enumerate(randoms)],
    }


def plumbing_records(names: Sequence[str], observed: Mapping[str, Sequence[float | None]]) -> list[Record]:
    """Gate A's observations, one record a sample, with the checks it was observed in."""
    return [
        {
            "type": "plumbing",
            "sample_id": name,
            **{check: values[row] for check, values in observed.items() if values[row] is not None},
        }
        for row, name in enumerate(names)
    ]


def repro_record(repeat: int, sample: OnSample, logprobs: torch.Tensor) -> Record:
    """The select arm of one sample in a repetition."""
    token = int(logprobs.argmax())
    return {
        "type": "repro",
        "repeat": repeat,
        "sample_id": sample.sample_id,
        "token_select": token,
        "correct_select": token == sample.answer_token_id,
        "answer_logprob_select": float(logprobs[sample.answer_token_id]),
    }


def _state(selection: Selection, placement: Placement) -> Record:
    return {
        "spans": [{"start": s.start, "end": s.end, "score": s.score} for s in selection.spans],
        "kept_tokens": list(placement.kept_tokens),
        "key_positions": list(placement.key_positions),
        "query_start": placement.query_start,
        "prefix_slots": placement.slots,
    }


def _at(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(B,) log-probability of one token a row."""
    return logprobs.gather(1, tokens[:, None])[:, 0]


def _by_sample(by_trial: Sequence[Sequence[Any]], n: int) -> list[list[Any]]:
    return [[values[row] for values in by_trial] for row in range(n)]


def _top(logprobs: torch.Tensor, tokenizer: Any, n: int) -> list[list[dict[str, Any]]]:
    """The n most probable tokens of each row."""
    values, ids = logprobs.topk(min(n, logprobs.shape[1]), dim=1)
    return [
        [
            {"token_id": token, "text": token_text(tokenizer, token), "logprob": value}
            for token, value in zip(row_ids, row_values, strict=True)
        ]
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
