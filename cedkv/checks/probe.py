"""The certificate's measurements: this pipeline against the model left alone, on a probe made of the model's own vocabulary.

*Left alone* is transformers' own eager attention, one unpadded row per call, with no mask, no positions and no cache given:
what anyone gets who loads the model and calls it. Gate A's certified checks are measured on the same probe.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from cedkv.checks.base import Check, CheckInputs, CheckResult, RunRecords, all_checks, measured_checks, run_checks
from cedkv.checks.stored import snapshot
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError
from cedkv.core.seeding import rng_for
from cedkv.core.values import OnEpisode, OnSample
from cedkv.inference.distributions import kl, log_softmax
from cedkv.inference.evidence import read_batch
from cedkv.inference.forward import Ids, next_token_logprobs
from cedkv.inference.prefix import encode
from cedkv.inference.teacher import TeacherOutput, read_teacher
from cedkv.kv import attention
from cedkv.kv.cache import KVPrefix
from cedkv.kv.positioning import place
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import Reading, RowAttention, ValueNorm
from cedkv.models import cpu
from cedkv.models.loading import LanguageModel
from cedkv.models.output_projection import grams
from cedkv.models.tokenizer import ordinary_tokens
from cedkv.models.weight_scan import weight_faults

DEMOS, QUERIES = (24, 17, 21, 24), (5, 3, 7, 4)
"""Tokens of the probe's demos and queries: of different lengths, so that batches are padded, two demos alike in length."""
WEIGHING = "cedkv-weighing"
"""Name of the eager implementation that returns the weights it gives to values."""
ROWS = {RowAttention(1, "mean"): 1, RowAttention(2, "mean"): 2, RowAttention(1, "max"): 1}
"""What is read of a query's attention -> how many of its last rows that is."""


@dataclass(frozen=True)
class Probe:
    """The probe's samples under every arm; log-probabilities are (B, vocabulary).

    kept: demo tokens kept in each sample's prefix.
    inputs: what measured checks compare with.
    teacher: the teacher's output, with attention of every layer.
    """

    lm: LanguageModel
    samples: list[OnSample]
    kept: list[tuple[int, ...]]
    inputs: CheckInputs
    teacher: TeacherOutput

    @property
    def layers(self) -> frozenset[int]:
        """All layers of the model."""
        return frozenset(range(self.lm.capabilities.n_layers))


class ProbeCheck(Check):
    """A check of the certificate alone: one figure on the probe, which must not exceed its limit."""

    gate = None
    unit = "nats"

    @abstractmethod
    def measure(self, probe: Probe) -> float | None:
        """Return the worst figure over the probe's samples; None where the check does not apply to the model."""

    def limit(self, dtype: str, nats: float) -> float:
        """Return the limit for a dtype, given the limit of mathematically identical KLs in nats."""
        return nats

    def judge(self, run: RunRecords) -> CheckResult | None:
        return None


@dataclass(frozen=True)
class Probed:
    """What was measured, the worst over the probe's samples.

    figures: name of a check (of a certified one of Gate A: its observation) -> figure in the check's unit; None for a check
        that does not apply to the model.
    floor: largest KL between two mathematically identical ways of calling the model left alone, in nats.
    fault: smallest KL that a planted fault makes here (a query one position too far, a kept token missing), in nats.
    effect: mean KL(teacher || base) in nats.
    """

    figures: dict[str, float | None]
    floor: float
    fault: float
    effect: float


def probe_samples(lm: LanguageModel) -> list[OnSample]:
    """Return samples of tokens drawn from the vocabulary, BOS in front where the tokenizer adds one."""
    ordinary = ordinary_tokens(lm.tokenizer, lm.vocabulary)
    scale = min(1.0, lm.capabilities.context / (max(DEMOS) + max(QUERIES) + 2))
    start = [token for token in lm.tokenizer("").input_ids if token == lm.tokenizer.bos_token_id][:1]
    samples = []
    for i, (demo_length, query_length) in enumerate(zip(DEMOS, QUERIES, strict=True)):
        length, asked = max(4, math.floor(demo_length * scale)), max(2, math.floor(query_length * scale))
        drawn = rng_for(0, "certificate", 0, str(i)).choice(ordinary, length + asked).tolist()
        demo, query = tuple(start + drawn[len(start) : length]), tuple(drawn[length:])
        kinds = tuple("bos" if t < len(start) else "input" for t in range(length))
        samples.append(OnSample(OnEpisode(f"probe-{i}", "", "", "", ()), demo, query, query[:1], kinds))  # type: ignore[arg-type]
    return samples


def _weighing(
    module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> tuple[Any, torch.Tensor]:
    """The model's own eager attention, and the weight each value has in it, (B, H_q, T_q, T): what comes out where the values
    are unit vectors, as wide as the model's values, because some models scale by that width. The map it returns itself may be
    another (Granite SWA's lacks the sink's share)."""
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]  # by that name in every model
    length, width = key.shape[2], value.shape[-1]
    units = torch.eye(length, -(-length // width) * width, dtype=key.dtype, device=key.device)
    weights = [
        eager(module, query, key, some.expand(*value.shape[:2], -1, -1), attention_mask, **more)[0].transpose(1, 2)
        for some in torch.split(units, width, dim=1)
    ]
    return eager(module, query, key, value, attention_mask, **more)[0], torch.cat(weights, dim=-1)[..., :length]


AttentionInterface.register(WEIGHING, _weighing)
AttentionMaskInterface.register(WEIGHING, eager_mask)


@contextmanager
def left_alone(model: Any, implementation: str = "eager") -> Iterator[None]:
    """Inside the context the model is as transformers gives it: eager attention, torch's own matrix products."""
    with cpu.torch_linear(model):
        model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            model.set_attn_implementation(attention.NAME)


@torch.inference_mode()
def run_probe(lm: LanguageModel) -> Probed:
    """Measure every check of the certificate on one probe; seconds at 135M parameters."""
    samples = probe_samples(lm)
    names, rows = [sample.sample_id for sample in samples], range(len(samples))
    demos, queries = [s.demo_token_ids for s in samples], [s.query_token_ids for s in samples]
    layers = frozenset(range(lm.capabilities.n_layers))
    weigh = _known_grams(lm)
    readings: list[Reading] = [*ROWS, *([ValueNorm()] if weigh else [])]
    reader = AttentionReader(layers, layer_readers(readings, weigh, None))
    teacher = read_teacher(lm, demos, queries, names, reader, keep=rows)
    base = next_token_logprobs(lm, [s.base_ids for s in samples], names)
    slots = max(map(len, demos)) // 2 + 3
    kept = [(0, *range(1 + i, len(demo), 2)) for i, demo in enumerate(demos)]
    placements = [place(k, len(d), "compact", "null_pad", slots) for k, d in zip(kept, demos, strict=True)]
    prefix = encode(lm, "prefill", samples, placements, None, ())
    config = Phase2Config().model_copy(update={"prefix_len": slots})
    inputs = CheckInputs(
        samples=samples,
        owners=samples,
        base=base,
        teacher=teacher.logprobs,
        select=next_token_logprobs(lm, queries, names, prefix),
        demo=teacher.demo_prefixes(rows),
        placements=placements,
        prefix=prefix,
        untouched=[snapshot(teacher.demo_prefixes(rows)), snapshot(prefix)],
        cached=_cache(),
        alone=lambda sample: read_batch(lm, [config], [sample], None, lambda *_: None, keep=[0]),
    )
    certified = [check for check in measured_checks() if check.certified]
    observed = run_checks(lm, config, inputs, certified)
    figures: dict[str, float | None] = {
        name: worst(value for value in values if value is not None) for name, values in observed.items()
    }
    case = Probe(lm, samples, kept, inputs, teacher)
    figures |= {check.name: check.measure(case) for check in all_checks() if isinstance(check, ProbeCheck)}
    with left_alone(lm.model):
        floor = _batched_alone(lm, [s.teacher_ids for s in samples])
    return Probed(figures, floor, _smallest_fault(case), float(kl(teacher.logprobs, base).mean()))


def faults_of(lm: LanguageModel) -> list[str]:
    """Return ``models.weight_scan.weight_faults`` of a model; scanned once."""
    if "weight_faults" not in lm.measured:
        lm.measured["weight_faults"] = weight_faults(lm.model, len(lm.tokenizer))
    faults: list[str] = lm.measured["weight_faults"]
    return faults


def _known_grams(lm: LanguageModel) -> dict[int, torch.Tensor]:
    """Return ``grams``; nothing for a model whose output projection is not known."""
    try:
        return grams(lm)
    except ModelError:
        return {}


def worst(values: Iterable[float]) -> float:
    """Return the largest value; NaN if one is NaN (Python's max may skip it) or if there is none, so that no check passes."""
    return float(np.max(list(values) or [math.nan]))


def _cache() -> Callable[[Any, Callable[[], Any]], Any]:
    values: dict[Any, Any] = {}

    def cached(key: Any, compute: Callable[[], Any]) -> Any:
        if key not in values:
            values[key] = compute()
        return values[key]

    return cached


def call_alone(lm: LanguageModel, rows: Sequence[Ids]) -> torch.Tensor:
    """Return log-probabilities after each row, (B, vocabulary), of a call with ids and nothing else."""
    return torch.cat([log_softmax(lm.model(torch.tensor([list(row)], device=lm.device)).logits[:, -1]) for row in rows])


def _batched_alone(lm: LanguageModel, rows: Sequence[Ids]) -> float:
    """Return the KL between rows of one length called together and one by one: what this model's rounding does."""
    width = min(map(len, rows))
    cut = [list(row[:width]) for row in rows]
    together = log_softmax(lm.model(torch.tensor(cut, device=lm.device)).logits[:, -1])
    return float(kl(together, call_alone(lm, cut)).max())


def _smallest_fault(probe: Probe) -> float:
    """Return the smallest KL that a planted fault makes, each the largest over the samples."""
    inputs, prefix = probe.inputs, probe.inputs.prefix
    last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
    planted: tuple[KVPrefix, ...] = (
        replace(prefix, query_start=prefix.query_start + 1),
        replace(prefix, visible=prefix.visible & ~last),
    )
    faulty = (next_token_logprobs(probe.lm, inputs.queries, inputs.names, wrong) for wrong in planted)
    return float(np.min([float(kl(logprobs, inputs.select).max()) for logprobs in faulty]))
