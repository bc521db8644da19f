"""The loop one would write without this suite, with plain transformers, and at the same time an oracle for it.

One sample and one arm at a time; eager attention, with ``output_attentions`` for the teacher; logits of the whole vocabulary
at all positions, which is what a model returns when nothing else is asked of it. It is not made slow on purpose: a prefix is
made once and copied for each prompt under it, it has no null slots, and weights are loaded once.

Spans are chosen by the suite's own pure functions, random draws included: the same spans are what makes the results the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cedkv.config.schema import Phase2Config
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OnSample, Placement, Record
from cedkv.kv.positioning import place
from cedkv.models.capabilities import scope_layers
from cedkv.selectors.base import SelectionTask, query_window, select_tokens, selector_class
from cedkv.tasks.load import Samples

NEAR = 1e-3
"""Log-probabilities in nats: those of unlikely tokens carry the rounding of logits, which a KL hardly sees."""
_KL = ("kl_", "phase2_delta_", "further_kl")
_MEASURED = (*_KL, "answer_logprob_", "base_entropy")


class Reference:
    """A model folder in float32; prefixes by ``prefill`` alone."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def evaluate(self, config: Phase2Config, samples: Samples) -> list[Record]:
        """One record an ON sample and an OFF prompt, with the engine's names for what it also has."""
        records, states = [], []
        for sample in samples.on:
            record, state = self._on(config, sample)
            records.append(record)
            states.append(state)
        for j, prompt in enumerate(samples.off):
            answer, alone = self._greedy(prompt.token_ids, config.eval.off_tokens)
            under = self._logprobs(prompt.student_ids, answer, *states[j % len(states)])
            records.append(
                {"kind": "off", "sample_id": prompt.sample_id, "token_base": int(alone[0].argmax()),
                 "token_select": int(under[0].argmax()), "phase2_delta_off_select": _kl(under[0], alone[0]),
                 "base_entropy": float(-(alone[0].exp() * alone[0]).sum()), "further_token_ids": answer,
                 "further_kl": [_kl(*pair) for pair in zip(under[1:], alone[1:], strict=True)],
                 "further_same": [int(a.argmax()) == int(b.argmax()) for a, b in zip(under[1:], alone[1:], strict=True)]}
            )  # fmt: skip
        return records

    def _on(self, config: Phase2Config, sample: OnSample) -> tuple[Record, tuple[Any, int]]:
        answer = sample.answer_token_ids
        base = self._logprobs(sample.base_ids, answer[:-1])
        output = self._forward(sample.teacher_ids, range(len(sample.teacher_ids)), output_attentions=True)
        teacher = [_log_softmax(output.logits[0, -1])]
        if len(answer) > 1:
            teacher = self._logprobs(sample.teacher_ids, answer[:-1])
        layers = scope_layers(config.layer_scope.selection, len(output.attentions), "layer_scope.selection")
        length, queried = len(sample.demo_token_ids), len(sample.query_token_ids)
        window = min(query_window(config.select) or queried, queried)
        read = torch.stack([output.attentions[layer][0, :, -window:, :length] for layer in sorted(layers)])
        known = Evidence(_pooled(config, read).double().numpy(), gold=sample.gold_tokens)
        chosen = self._place(config, sample, known, config.select.mode, "select", 0)
        state = self._state(sample, chosen)
        select = self._logprobs(sample.query_token_ids, answer[:-1], *state)
        drawn = [
            self._place(config, sample, known, "random_span", "random", trial) for trial in range(config.eval.n_random_trials)
        ]
        randoms = [self._logprobs(sample.query_token_ids, answer[:-1], *self._state(sample, placed)) for placed in drawn]
        record: Record = {"kind": "on", "sample_id": sample.sample_id, "kept_tokens": list(chosen.kept_tokens)}
        record["random_kept_tokens"] = [list(placed.kept_tokens) for placed in drawn]
        for name, arm in {"base": base, "teacher": teacher, "select": select}.items():
            record[f"correct_{name}"], record[f"answer_logprob_{name}"] = _answered(arm, answer)
        record["correct_random"] = [_answered(arm, answer)[0] for arm in randoms]
        record["answer_logprob_random"] = [_answered(arm, answer)[1] for arm in randoms]
        record |= {"kl_base_teacher": _kl(base[0], teacher[0]), "kl_select_teacher": _kl(select[0], teacher[0])}
        record["kl_random_teacher"] = [_kl(arm[0], teacher[0]) for arm in randoms]
        record["kl_random_base"] = [_kl(arm[0], base[0]) for arm in randoms]
        record["phase2_delta_on_select"] = _kl(select[0], base[0])
        return record, state

    def _place(self, config: Phase2Config, sample: OnSample, known: Evidence, mode: str, purpose: str, trial: int) -> Placement:
        rng = rng_for(config.seed, purpose, trial, sample.sample_id)
        selection = select_tokens(selector_class(mode)(), SelectionTask(config.select, sample.token_kinds, known, rng))
        length, positioning = len(sample.demo_token_ids), config.injection.positioning_mode
        return place(selection.kept_tokens, length, positioning, "shrink_to_selected", config.prefix_len)

    def _state(self, sample: OnSample, placed: Placement) -> tuple[Any, int]:
        """The kept tokens' cache, and the position after it."""
        kept = [sample.demo_token_ids[token] for token in placed.kept_tokens]
        return self._forward(kept, placed.key_positions, use_cache=True).past_key_values, placed.query_start

    def _logprobs(
        self, tokens: Sequence[int], given: Sequence[int] = (), state: Any = None, start: int = 0
    ) -> list[torch.Tensor]:
        """(vocabulary,) log-probabilities after the last token, and after each of the tokens given behind it."""
        cache = {} if state is None else {"past_key_values": copy.deepcopy(state), "use_cache": True}
        row = [*tokens, *given]
        logits = self._forward(row, range(start, start + len(row)), **cache).logits[0, len(tokens) - 1 :]
        return [_log_softmax(after) for after in logits]

    def _greedy(self, tokens: Sequence[int], n: int) -> tuple[list[int], list[torch.Tensor]]:
        """The model's own answer, at most n tokens, and the log-probabilities after the prompt and after each of these."""
        output = self._forward(tokens, range(len(tokens)), use_cache=True)
        answer: list[int] = []
        after = [_log_softmax(output.logits[0, -1])]
        while len(answer) < n and (token := int(after[-1].argmax())) != self.model.generation_config.eos_token_id:
            place = range(len(tokens) + len(answer), len(tokens) + len(answer) + 1)
            output = self._forward([token], place, past_key_values=output.past_key_values, use_cache=True)
            answer.append(token)
            after.append(_log_softmax(output.logits[0, -1]))
        return answer, after

    def _forward(self, tokens: Sequence[int], positions: Sequence[int], **more: Any) -> Any:
        past = more["past_key_values"].get_seq_length() if "past_key_values" in more else 0
        mask = torch.ones(1, past + len(tokens), dtype=torch.long)
        ids, at = torch.tensor([list(tokens)]), torch.tensor([list(positions)])
        return self.model(input_ids=ids, attention_mask=mask, position_ids=at, **more)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(dim=-1)


def _answered(after: Sequence[torch.Tensor], answer: Sequence[int]) -> tuple[bool, float]:
    """Whether every token of an answer is the greedy one, and its log-probability."""
    found = list(zip(after, answer, strict=True))
    return all(int(a.argmax()) == token for a, token in found), sum(float(a[token]) for a, token in found)


def _kl(student: torch.Tensor, reference: torch.Tensor) -> float:
    """KL(student || reference) in nats."""
    return float((student.exp() * (student - reference)).sum().clamp_min(0))


def largest_difference(engine: Sequence[Record], reference: Sequence[Record]) -> float:
    """The largest difference of a KL, in nats, between the engine's records and the reference's.

    Raises:
        AssertionError: an answer or a selection is not the same, the answer's log-probability is not within ``NEAR``, or a
            sample is missing; it is named.
    """
    kept = {r["sample_id"]: r for r in engine if r["type"] == "selection"}
    found = {r["sample_id"]: r for r in engine if r["type"] == "sample"}
    if found.keys() != {record["sample_id"] for record in reference}:
        raise AssertionError("the engine and the reference have other samples")
    worst = 0.0
    for record in reference:
        sample, own = record["sample_id"], dict(found[record["sample_id"]])
        if record["kind"] == "on":
            own["kept_tokens"] = kept[sample]["kept_tokens"]
            own["random_kept_tokens"] = [trial["kept_tokens"] for trial in kept[sample]["random"]]
        for name, value in record.items():
            apart = float(np.max(np.abs(np.subtract(own[name], value)), initial=0)) if name.startswith(_MEASURED) else 0.0
            if name.startswith(_KL):
                worst = max(worst, apart)
            elif apart > NEAR or (apart == 0 and own[name] != value):
                raise AssertionError(f"sample {sample}: {name} is {own[name]} in the engine, {value} in the reference")
    return worst


def _pooled(config: Phase2Config, read: torch.Tensor) -> torch.Tensor:
    """(layers, heads, rows, L) -> (L,): over rows, then heads, then layers."""
    select = config.select
    for dim, pooling in ((2, select.row_pooling), (1, select.head_pooling), (0, select.layer_pooling)):
        read = read.mean(dim=dim) if pooling == "mean" else read.amax(dim=dim)
    return read
