"""What a unit of work leaves behind: plain records, one a sample, from which every figure is computed.

Names are those of the tables and of ``metrics.jsonl``; KL in nats, log-probabilities natural.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cedkv.lm.scoring import kl
from cedkv.selectors.common import attention_score
from cedkv.types import Candidate, Evidence, OffSample, OnSample, Placement, Record, Selection


def on_record(
    sample: OnSample,
    arms: dict[str, torch.Tensor],
    randoms: Sequence[torch.Tensor],
    evidence: Evidence,
    selection: Selection,
    span_len: int,
    tokenizer: Any,
    topk: int,
) -> Record:
    """One ON sample under every arm.

    Args:
        arms: base, teacher, select -> (vocabulary,) log-probabilities.
        randoms: the same for each random trial.
        topk: tokens of each arm's distribution to keep.
    """
    answer = sample.answer_token_id
    base, teacher, select = arms["base"], arms["teacher"], arms["select"]
    kl_base_teacher = float(kl(base, teacher))
    kl_select_teacher = float(kl(select, teacher))
    scores = [span.score for span in selection.spans]
    attention = [attention_score(Candidate(span.start, span.end), evidence) for span in selection.spans]
    record: Record = {"type": "sample", "kind": "on", "sample_id": sample.sample_id, "answer_token_id": answer}
    for name, logprobs in arms.items():
        token = int(logprobs.argmax())
        record[f"token_{name}"] = token
        record[f"correct_{name}"] = token == answer
        record[f"answer_logprob_{name}"] = float(logprobs[answer])
    tokens = [int(logprobs.argmax()) for logprobs in randoms]
    record |= {
        "token_random": tokens,
        "correct_random": [token == answer for token in tokens],
        "answer_logprob_random": [float(logprobs[answer]) for logprobs in randoms],
        "kl_base_teacher": kl_base_teacher,
        "kl_select_teacher": kl_select_teacher,
        "kl_random_teacher": [float(kl(logprobs, teacher)) for logprobs in randoms],
        "kl_random_base": [float(kl(logprobs, base)) for logprobs in randoms],
        "rel_kl_to_teacher": kl_select_teacher / (kl_base_teacher + 1e-6),
        "phase2_delta_on_select": float(kl(select, base)),
        "phase2_answer_logprob_gain": float(select[answer] - base[answer]),
        "phase2_selection_score_attention": float(np.mean(attention)),
        "selector_score": float(np.mean(scores)),
    }
    if evidence.causal_drop is not None:
        drops = evidence.causal_drop
        chosen = [drops[span.start] for span in selection.spans if span.start in drops]
        record["phase2_selection_score_causal_drop"] = float(np.mean(chosen)) if chosen else None
        record["candidate_causal_drop"] = [drops[start] for start in sorted(drops)]
        record["candidate_attention"] = [
            attention_score(Candidate(start, start + span_len), evidence) for start in sorted(drops)
        ]
    record["topk"] = {name: _top(logprobs, tokenizer, topk) for name, logprobs in arms.items()}
    return record


def off_record(sample: OffSample, state_of: str, alone: torch.Tensor, under: torch.Tensor, delta: float) -> Record:
    """One OFF prompt alone (base) and under a state (select)."""
    return {
        "type": "sample",
        "kind": "off",
        "sample_id": sample.sample_id,
        "state_of": state_of,
        "token_base": int(alone.argmax()),
        "token_select": int(under.argmax()),
        "same_token": int(alone.argmax()) == int(under.argmax()),
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


def plumbing_records(names: Sequence[str], observed: dict[str, list[float]]) -> list[Record]:
    """Gate A's observations, one record a sample."""
    return [
        {"type": "plumbing", "sample_id": name, **{check: values[row] for check, values in observed.items()}}
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


def _top(logprobs: torch.Tensor, tokenizer: Any, n: int) -> list[dict[str, Any]]:
    values, ids = logprobs.topk(n)
    return [
        {"token_id": token, "text": tokenizer.decode([token]), "logprob": value}
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    ]
