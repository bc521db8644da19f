"""Gate A's second half: what the arms did, done once more in another way. By the model left alone (one row, one pass, no cache
of ours), by float64, by the rules said in other words.

Observations are one value a sample, as in ``plumbing.py``, which measures whether the pipeline agrees with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cedkv import selectors
from cedkv.config.schema import Phase2Config
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OffSample, OnSample, Placement, Selection
from cedkv.inference.forward import kl, log_softmax, next_token_logprobs, prefill
from cedkv.inference.prefix import encode
from cedkv.inference.teacher import TeacherOutput, read_teacher
from cedkv.kv.attention import AttentionReader
from cedkv.kv.cache import KVPrefix
from cedkv.models.loading import LanguageModel
from cedkv.selectors.base import SelectionTask

NARROWER = {
    "float32": (torch.bfloat16, torch.float16),
    "float16": (torch.bfloat16,),
    "bfloat16": (torch.float8_e5m2,),
}
"""Dtypes that hold few of a dtype's numbers exactly: K/V that fit into one were computed or kept in it."""
SOME_OUTPUTS, SOME_TOKENS = 16, 256


@dataclass(frozen=True)
class CheckInputs:
    """What the arms computed for B samples: log-probabilities are (B, vocabulary).

    owners: the samples whose demos the prefixes are of (others than ``samples`` under ``wrong_demo`` only); selections,
        evidence, placements and prefix are theirs.
    demo: the samples' demos' caches, demo token t in slot t.
    untouched: copies of the demos' caches and of the prefixes, made before their first use.
    once: keeps what does not depend on the condition, by key.
    off: for some rows an OFF prompt that runs under the row's state, and its (vocabulary,) answer.
    layers, window: the attention that was read. (These and what was selected are asked for by ``once_more`` only.)
    """

    samples: Sequence[OnSample]
    owners: Sequence[OnSample]
    base: torch.Tensor
    teacher: torch.Tensor
    select: torch.Tensor
    demo: KVPrefix
    placements: Sequence[Placement]
    prefix: KVPrefix
    untouched: Sequence[KVPrefix]
    cached: Callable[[Any, Callable[[], Any]], Any]
    selections: Sequence[Selection] = ()
    evidence: Sequence[Evidence] = ()
    off: Sequence[tuple[int, OffSample, torch.Tensor]] = ()
    layers: frozenset[int] = frozenset()
    window: int = 1

    @property
    def names(self) -> list[str]:
        return [sample.sample_id for sample in self.samples]

    @property
    def queries(self) -> list[tuple[int, ...]]:
        return [sample.query_token_ids for sample in self.samples]


def once_more(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> Mapping[str, Sequence[float | None]]:
    """All observations of this file that apply: check name -> one value a sample, None where it was not observed."""
    found: dict[str, Sequence[float | None]] = {
        "attention_alone": attention_alone(lm, config, given),
        "selection_rules": selection_rules(config, given),
        "kv_precision": kv_precision(config, given),
    }
    injection = lm.injection_layers(config.layer_scope.injection)
    if in_one_pass(lm, config):
        found["left_alone"] = left_alone(lm, config, given)
    if injection is not None:
        found["unseen_layers"] = unseen_layers(lm, given, injection)
    if config.prefix.kv_source == "gather":
        found["first_layer"] = first_layer(lm, config, given)
    if given.off:
        found["off_alone"] = off_alone(lm, config, given)
    if rounding := given.cached("arithmetic", lambda: arithmetic(lm, given)):
        found["arithmetic"] = rounding
    return found


def teacher_alone(lm: LanguageModel, given: CheckInputs, sample: OnSample) -> TeacherOutput:
    """The teacher's reading of one sample in a batch of its own."""

    def compute() -> TeacherOutput:
        demo, query = [sample.demo_token_ids], [sample.query_token_ids]
        return read_teacher(lm, demo, query, [sample.sample_id], AttentionReader(given.layers, given.window), keep=[0])

    found: TeacherOutput = given.cached(("alone", sample.sample_id), compute)
    return found


def base_alone(lm: LanguageModel, given: CheckInputs, sample: OnSample) -> torch.Tensor:
    """Base of one sample in a batch of its own, (1, vocabulary)."""
    found: torch.Tensor = given.cached(
        ("base alone", sample.sample_id), lambda: next_token_logprobs(lm, [sample.base_ids], [sample.sample_id])
    )
    return found


def in_one_pass(lm: LanguageModel, config: Phase2Config) -> bool:
    """Whether a student is one uncached pass of kept tokens and query: they are, when the kept tokens see each other only and
    every layer sees them."""
    return config.prefix.kv_source == "prefill" and lm.injection_layers(config.layer_scope.injection) is None


def left_alone(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """KL(kept tokens, then the query, in one uncached pass at the positions the mode means || select)."""
    found = [
        kl(_uncached(lm, config, owner, selection, sample.query_token_ids), select[None])
        for sample, owner, selection, select in zip(given.samples, given.owners, given.selections, given.select, strict=True)
    ]
    return torch.cat(found).tolist()


def off_alone(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float | None]:
    """KL(an OFF prompt behind the state of its ON sample, alone || in the batch used); None for a row without an OFF prompt."""
    out: list[float | None] = [None] * len(given.samples)
    for row, prompt, under in given.off:
        owner, selection = given.owners[row], given.selections[row]
        if in_one_pass(lm, config):
            alone = _uncached(lm, config, owner, selection, prompt.student_ids)
        else:
            demo = teacher_alone(lm, given, owner).demo
            state = encode(lm, config.prefix.kv_source, [owner], [given.placements[row]], demo, [0])
            injection = lm.injection_layers(config.layer_scope.injection)
            alone = next_token_logprobs(lm, [prompt.student_ids], [prompt.sample_id], state, injection)
        out[row] = float(kl(alone, under[None]))
    return out


def first_layer(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """Largest difference between the prefix's first layer and the model's own K/V of the kept tokens at the positions the mode
    means, over the largest: there K/V depend on nothing but token and position, wherever they were gathered."""
    kept = [selection.kept_tokens for selection in given.selections]
    tokens = [[owner.demo_token_ids[t] for t in its] for owner, its in zip(given.owners, kept, strict=True)]
    places = [_places(config, its, owner)[0] for owner, its in zip(given.owners, kept, strict=True)]
    keys, values = prefill(lm, tokens, places, given.names)
    out = []
    for row, its in enumerate(kept):
        pairs = ((given.prefix.keys[0], keys[0]), (given.prefix.values[0], values[0]))
        worst = [_relative(of[row, :, : len(its)], own[row, :, : len(its)]) for of, own in pairs]
        out.append(float(np.max(worst)))
    return out


def unseen_layers(lm: LanguageModel, given: CheckInputs, injection: frozenset[int]) -> list[float]:
    """KL(select with other K/V in the layers that are not to see the prefix || select)."""

    def elsewhere(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(t if layer in injection else -t for layer, t in enumerate(tensors))

    other = replace(given.prefix, keys=elsewhere(given.prefix.keys), values=elsewhere(given.prefix.values))
    return kl(next_token_logprobs(lm, given.queries, given.names, other, injection), given.select).tolist()


def attention_alone(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """Largest difference between a demo's attention scores alone and those selected by, over the largest score."""
    layers, window = lm.selection_layers(config.layer_scope.selection), config.select.query_window
    out = []
    for owner, evidence in zip(given.owners, given.evidence, strict=True):
        alone = teacher_alone(lm, given, owner).attention(0, layers, window)
        same = alone.shape == evidence.attention.shape
        out.append(float(np.abs(alone - evidence.attention).max() / np.abs(alone).max()) if same else 1.0)
    return out


def selection_rules(config: Phase2Config, given: CheckInputs) -> list[float]:
    """1 for a sample whose kept tokens are not what its own evidence gives, or not BOS, sinks and spans alone, or not where the
    modes mean them to be; else 0."""
    return [
        0.0 if _as_ruled(config, owner, selection, evidence, placement) else 1.0
        for owner, selection, evidence, placement in zip(
            given.owners, given.selections, given.evidence, given.placements, strict=True
        )
    ]


def _as_ruled(config: Phase2Config, owner: OnSample, selection: Selection, evidence: Evidence, placement: Placement) -> bool:
    rng = rng_for(config.seed, "select", 0, owner.sample_id)
    own = selectors.select(config.select.mode, SelectionTask(config.select, owner.token_kinds, evidence, rng))
    length = len(owner.demo_token_ids)
    kept = set(range(min(int(owner.has_bos) + config.select.keep_sink, length)))
    kept |= {token for span in own.spans for token in range(span.start, span.end)}
    at, start = _places(config, sorted(kept), owner)
    slots = max(config.prefix_len, len(kept)) if config.prefix.padding_mode == "null_pad" else len(kept)
    ruled = Placement(tuple(sorted(kept)), tuple(at), start, slots)
    return selection.spans == own.spans and selection.kept_tokens == ruled.kept_tokens and placement == ruled


def kv_precision(config: Phase2Config, given: CheckInputs) -> list[float]:
    """Share of K/V numbers that a narrower dtype holds exactly, the larger of demo and prefix; 1 where they are of another
    dtype than the run's. By chance it is 1 in 8 at most."""
    dtype = config.runtime.torch_dtype
    worst = np.zeros(len(given.samples))
    for prefix in (given.demo, given.prefix):
        kept = [t[:, :, :SOME_TOKENS].flatten(1) for t in (*prefix.keys, *prefix.values)]
        if any(str(tensor.dtype) != f"torch.{dtype}" for tensor in kept):
            return [1.0] * len(worst)
        some = sum((tensor != 0).sum(dim=1) for tensor in kept)
        for narrow in NARROWER[dtype]:
            exact = sum(((tensor != 0) & (tensor.to(narrow).to(tensor.dtype) == tensor)).sum(dim=1) for tensor in kept)
            worst = np.maximum(worst, (exact / some).cpu().numpy())  # type: ignore[union-attr]
    return worst.tolist()


@torch.inference_mode()
def arithmetic(lm: LanguageModel, given: CheckInputs) -> list[float]:
    """Largest |y - W x| over |W| |x| of some outputs of every linear layer, W x in float64, in one pass of the shortest query.

    Empty where the model has no linear layers of plain floating-point weights.
    """
    errors: list[float] = []

    def look(layer: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not output.numel():
            return
        at = torch.linspace(0, layer.out_features - 1, min(SOME_OUTPUTS, layer.out_features)).long().to(layer.weight.device)
        row = inputs[0].reshape(-1, layer.in_features)[-1].cpu().double()
        weight, bias = layer.weight[at].cpu().double(), 0.0 if layer.bias is None else layer.bias[at].cpu().double()
        found = output.reshape(-1, layer.out_features)[-1, at].cpu().double()
        scale = weight.abs() @ row.abs() + abs(bias)
        errors.append(float(((found - (weight @ row + bias)).abs() / scale.clamp_min(1e-30)).max()))

    plain = [m for m in lm.model.modules() if type(m) is torch.nn.Linear and not m.weight.is_meta]
    hooks = [layer.register_forward_hook(look) for layer in plain if layer.weight.is_floating_point()]
    try:
        ids = torch.tensor([min((sample.base_ids for sample in given.samples), key=len)], device=lm.device)
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [float(np.max(errors))] * len(given.samples) if errors else []


def _places(config: Phase2Config, kept: Sequence[int], owner: OnSample) -> tuple[list[int], int]:
    """Positions of kept tokens and of the query, said apart from ``positioning``."""
    if config.injection.positioning_mode == "absolute":
        return list(kept), len(owner.demo_token_ids)
    return list(range(len(kept))), len(kept)


@torch.inference_mode()
def _uncached(
    lm: LanguageModel, config: Phase2Config, owner: OnSample, selection: Selection, query: Sequence[int]
) -> torch.Tensor:
    """(1, vocabulary) log-probabilities after kept tokens and query in one row, by the model's own forward pass."""
    at, start = _places(config, selection.kept_tokens, owner)
    ids = torch.tensor([[*(owner.demo_token_ids[t] for t in selection.kept_tokens), *query]], device=lm.device)
    positions = torch.tensor([[*at, *range(start, start + len(query))]], device=lm.device)
    output = lm.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False, logits_to_keep=1
    )
    return log_softmax(output.logits[:, -1])


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).float().abs().max() / expected.float().abs().max())
