"""Gate A: what is read after the next token (whole answers, base's answers to OFF prompts), found again in another way.

The arms give these tokens behind their rows, in the pass of the row. Here they are decoded, each in a pass of its own over a
cache that grows, or belong to the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from cedkv.checks.base import CheckInputs, MeasuredCheck
from cedkv.checks.reference import off_alone
from cedkv.config.schema import Phase2Config
from cedkv.inference.decoding import decode
from cedkv.inference.distributions import kl, log_softmax
from cedkv.inference.forward import Ids
from cedkv.kv.cache import KVPrefix
from cedkv.models.loading import LanguageModel


def _decoded(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    given: Sequence[Ids],
    prefix: KVPrefix | None = None,
    injection_layers: frozenset[int] | None = None,
) -> list[list[torch.Tensor]]:
    """Return per row the log-probabilities, (vocabulary,), after 0, 1, ... of its given tokens, decoded one by one."""
    after: list[list[torch.Tensor]] = [[] for _ in rows]
    for count in sorted(set(map(len, given))):  # no row runs beyond its own tokens, where the model may have no position
        alike = [row for row, tokens in enumerate(given) if len(tokens) == count]

        def choose(done: int, indices: list[int], logits: torch.Tensor, alike: list[int] = alike) -> torch.Tensor | None:
            for i, logprobs in zip(indices, log_softmax(logits), strict=True):
                after[alike[i]][done:] = [logprobs]
            following = [given[alike[i]][done : done + 1] for i in indices]
            return torch.tensor(following, device=logits.device).flatten()

        under = None if prefix is None else prefix.rows(alike)
        decode(lm, [rows[row] for row in alike], [names[row] for row in alike], count, choose, under, injection_layers)
    return after


class AnswerAlone(MeasuredCheck):
    """Tokens of an answer, decoded one at a time = all in one pass.

    Largest difference of the log-probability of an answer's token, under teacher and select. It applies where an answer has
    several tokens.

    Why: the tokens of an answer are given in one pass, where a shift by one would go unnoticed. Cannot see: answers of one
    token, and whether these tokens are the answer.
    """

    name, unit = "answer_alone", "nats"

    def limit(self, config: Phase2Config) -> float:
        return config.difference_limit("batch_kl_max")

    def expected(self, config: Phase2Config) -> bool:
        return False

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> Sequence[float | None] | None:
        several = [row for row, sample in enumerate(inputs.samples) if len(sample.answer_token_ids) > 1]
        if not several:
            return None
        injection = lm.injection_layers(config.layer_scope.injection)
        worst: list[float | None] = [None] * len(inputs.samples)
        teacher = inputs.cached(self.name, lambda: self._differences(lm, inputs, several, "teacher"))
        select = self._differences(lm, inputs, several, "select", inputs.prefix.rows(several), injection)
        for row, pair in zip(several, zip(teacher, select, strict=True), strict=True):
            worst[row] = float(np.max(pair))  # NaN stays NaN
        return worst

    def _differences(
        self,
        lm: LanguageModel,
        inputs: CheckInputs,
        rows: Sequence[int],
        arm: str,
        prefix: KVPrefix | None = None,
        injection: frozenset[int] | None = None,
    ) -> list[float]:
        """Return the largest difference over the tokens of each of some samples' answers."""
        samples, names = [inputs.samples[row] for row in rows], [inputs.names[row] for row in rows]
        prompts = [sample.teacher_ids if prefix is None else sample.query_token_ids for sample in samples]
        given = [sample.answer_token_ids[:-1] for sample in samples]
        differences = []
        for row, sample, after in zip(rows, samples, _decoded(lm, prompts, names, given, prefix, injection), strict=True):
            found = [float(logprobs[token]) for logprobs, token in zip(after, sample.answer_token_ids, strict=True)]
            differences.append(float(np.abs(np.subtract(found, inputs.answers[arm][row, : len(found)].tolist())).max()))
        return differences


class OffFurtherAlone(MeasuredCheck):
    """The effect along base's answer to an OFF prompt, in a batch of one = in the batch.

    Largest difference of KL(select || base) after a token of the answer, for the longest two OFF prompts of every unit and
    its shortest one. Alone, prompt and answer are one row, read at its last tokens. It applies where ``eval.off_tokens`` is
    set.

    Why: the tokens of base's answer are given in one pass, where a shift by one would go unnoticed. Cannot see: whether
    these tokens are what base would answer.
    """

    name, unit = "off_further_alone", "nats"
    of_off_prompts = True

    def limit(self, config: Phase2Config) -> float:
        return config.difference_limit("batch_kl_max")

    def expected(self, config: Phase2Config) -> bool:
        return False

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> Sequence[float | None] | None:
        if not inputs.off_further:
            return None
        worst: list[list[float]] = [[] for _ in inputs.samples]
        for row, prompt, tokens, batched in inputs.off_further:
            base = inputs.cached(("OFF base alone", prompt.sample_id), partial(_uncached, lm, prompt.token_ids, tokens))
            under = off_alone(lm, config, inputs, row, prompt)[1:]
            worst[row].append(float(np.abs(np.subtract(kl(under, base).tolist(), batched)).max()))
        return [float(np.max(of_row)) if of_row else None for of_row in worst]  # NaN stays NaN


@torch.inference_mode()
def _uncached(lm: LanguageModel, prompt: Ids, tokens: Ids) -> torch.Tensor:
    """Return the log-probabilities after each token of base's answer, (tokens, vocabulary), from one row without a cache."""
    ids = torch.tensor([[*prompt, *tokens]], device=lm.device)
    positions = torch.arange(ids.shape[1], device=lm.device)[None]
    output = lm.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=len(tokens),
    )
    return log_softmax(output.logits[0, -len(tokens) :])
