"""Gate A, first half: does the cache pipeline agree with itself on this very model?

Each check compares two ways to the same distribution (or the same tensor), on the run's own samples, through the functions
that the arms use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from cedkv.checks.base import CheckInputs, MeasuredCheck
from cedkv.checks.reference import alone_base, alone_batch, alone_student, is_one_pass
from cedkv.checks.rotation import ROTATION_SHIFT, rotation_moves_queries
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Placement
from cedkv.inference.distributions import kl, log_softmax
from cedkv.inference.forward import left_padded, next_token_logprobs
from cedkv.inference.prefix import encode
from cedkv.kv.cache import assemble, cache_argument, output_cache
from cedkv.kv.positioning import place
from cedkv.models.loading import LanguageModel


class DemoFirst(NamedTuple):
    """What follows from the demos run first and the queries behind them: KL(. || teacher) per sample, in nats.

    incremental: over the model's own cache, which the query makes grow.
    prefilled: over the same K/V, taken out as prefixes that keep every demo token in its place.
    """

    incremental: list[float]
    prefilled: list[float]


def _demo_first(lm: LanguageModel, inputs: CheckInputs) -> DemoFirst:
    """Return ``DemoFirst``, measured once for all conditions of the batch: two checks share the demos' passes."""
    measured: DemoFirst = inputs.cached("demo first", lambda: _measure_demo_first(lm, inputs))
    return measured


@torch.inference_mode()
def _measure_demo_first(lm: LanguageModel, inputs: CheckInputs) -> DemoFirst:
    waiting: dict[tuple[int, ...], list[int]] = {}
    for row, sample in enumerate(inputs.samples):
        waiting.setdefault(sample.demo_token_ids, []).append(row)
    with _own_caches(lm.model.base_model) as passes:
        prefix = encode(lm, "prefill", inputs.samples, _whole_demos(inputs), None, ())
    prefilled = kl(next_token_logprobs(lm, inputs.queries, inputs.names, prefix), inputs.teacher)
    incremental = torch.empty_like(prefilled)
    for ids, mask, cache in passes:
        demos = [tuple(row[seen].tolist()) for row, seen in zip(ids, mask.bool(), strict=True)]
        rows = [waiting[demo].pop() for demo in demos]
        query_ids, query_mask, query_positions = left_padded([inputs.queries[row] for row in rows], lm.device)
        query = lm.model(
            input_ids=query_ids,
            attention_mask=torch.cat([mask, query_mask], dim=1),
            position_ids=query_positions + mask.sum(dim=1, keepdim=True),
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(lm.model, cache),
        )
        incremental[rows] = kl(log_softmax(query.logits[:, -1]), inputs.teacher[rows])
    return DemoFirst(incremental.tolist(), prefilled.tolist())


def _whole_demos(inputs: CheckInputs) -> list[Placement]:
    """Return the placements that keep every demo token in its place."""
    lengths = [len(sample.demo_token_ids) for sample in inputs.samples]
    return [place(range(n), n, "absolute", "shrink_to_selected", n) for n in lengths]


@contextmanager
def _own_caches(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, DynamicCache]]]:
    """Collect ids, mask and the model's own cache of every pass inside the context."""
    passes: list[tuple[torch.Tensor, torch.Tensor, DynamicCache]] = []

    def collect(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        passes.append((given["input_ids"], given["attention_mask"], output_cache(output)))

    hook = model.register_forward_hook(collect, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


class TeacherIncremental(MeasuredCheck):
    """Demo cached, then query = one uncached pass.

    KL(incremental || teacher). The cache is the model's own growing one, none of this suite's. The demos run once for this
    check and for ``keep_all_absolute``.

    Why: every other check takes for granted that this model computes the same with a cache as without. Cannot see: what is
    wrong in both passes alike, such as the tokens themselves.
    """

    name, threshold = "teacher_incremental", "teacher_incremental_kl_max"
    counts_to_floor = certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return _demo_first(lm, inputs).incremental


class NullEffect(MeasuredCheck):
    """An all-null prefix = base.

    KL(``prefix_len`` null slots, then the query || base).

    Why: null slots must take room and nothing else; a zero that is not masked takes its share of every softmax. Cannot see:
    what becomes of kept tokens: there are none.
    """

    name, threshold = "null_effect", "null_effect_kl_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        key = (self.name, config.prefix_len, str(config.layer_scope.injection))
        return inputs.cached(key, lambda: self._measure(lm, config, inputs))

    def _measure(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        nothing = tuple(k[:, :, :0] for k in inputs.prefix.keys), tuple(v[:, :, :0] for v in inputs.prefix.values)
        prefix = assemble(*nothing, [Placement((), (), 0, config.prefix_len) for _ in inputs.samples])
        rows = [sample.base_ids for sample in inputs.samples]
        injection = lm.injection_layers(config.layer_scope.injection)
        return kl(next_token_logprobs(lm, rows, inputs.names, prefix, injection), inputs.base).tolist()


class KeepAllAbsolute(MeasuredCheck):
    """Every token kept in its place, or moved with the query = teacher.

    The larger KL(. || teacher) of prefill and gather, in all layers. Where positions do nothing but rotate keys and queries,
    gathered keys and query move by the same number of positions, which changes nothing either.

    Why: with nothing left out the prefix must say what the demo says: encoding, positions, mask and injection in one
    figure. Cannot see: which tokens are selected, and gaps between them: there are none.
    """

    name, threshold = "keep_all_absolute", "keep_all_kl_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return inputs.cached(self.name, lambda: self._measure(lm, inputs))

    def _measure(self, lm: LanguageModel, inputs: CheckInputs) -> list[float]:
        shift, prefilled = self._shift(lm, inputs), _demo_first(lm, inputs).prefilled
        placements = [
            replace(p, key_positions=tuple(q + shift for q in p.key_positions), query_start=p.query_start + shift)
            for p in _whole_demos(inputs)
        ]
        prefix = encode(lm, "gather", inputs.samples, placements, inputs.demo, range(len(placements)))
        gathered = kl(next_token_logprobs(lm, inputs.queries, inputs.names, prefix), inputs.teacher)
        return np.maximum(prefilled, gathered.tolist()).tolist()  # NaN stays NaN

    @staticmethod
    def _shift(lm: LanguageModel, inputs: CheckInputs) -> int:
        """Return the positions by which keys and query can move together: 0 where positions do more than rotate."""
        if lm.rope_layouts is None:
            return 0
        ends = [len(sample.teacher_ids) for sample in inputs.samples]
        starts = [len(sample.demo_token_ids) for sample in inputs.samples]
        shift = min(ROTATION_SHIFT, lm.capabilities.max_positions - max(ends))
        queried = sorted({p for start, end in zip(starts, ends, strict=True) for p in range(start, end)})
        return shift if rotation_moves_queries(lm, inputs.names[0], inputs.queries[0][0], queried, shift) else 0


class PaddingEquivalence(MeasuredCheck):
    """null_pad = shrink_to_selected.

    KL(the prefix in the other padding mode || select).

    Why: slots must change shapes alone. Cannot see: what is wrong in the kept tokens, which both modes share.
    """

    name, threshold = "padding_equivalence", "padding_kl_max"
    counts_to_floor = certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        kept = [len(p.kept_tokens) for p in inputs.placements]
        shrink = any(p.slots > n for p, n in zip(inputs.placements, kept, strict=True))
        slots = kept if shrink else [max(config.prefix_len, n) for n in kept]
        placements = [replace(p, slots=n) for p, n in zip(inputs.placements, slots, strict=True)]
        keys, values = inputs.prefix.keys, inputs.prefix.values
        longest = max(kept)
        prefix = assemble(tuple(k[:, :, :longest] for k in keys), tuple(v[:, :, :longest] for v in values), placements)
        injection = lm.injection_layers(config.layer_scope.injection)
        return kl(next_token_logprobs(lm, inputs.queries, inputs.names, prefix, injection), inputs.select).tolist()


class BatchConsistency(MeasuredCheck):
    """A batch of N = N batches of 1.

    The largest KL(alone || in the batch used) of base, teacher and select. Where a student is one uncached pass,
    ``left_alone`` measures the select arm.

    Why: padding and the other rows of a batch must not leak into a sample. Cannot see: what is wrong in a batch of one as
    well.
    """

    name, threshold = "batch_consistency", "batch_kl_max"
    counts_to_floor = certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        worst = []
        for row, sample in enumerate(inputs.samples):
            pairs = [(alone_base(lm, inputs, sample), inputs.base)]
            pairs.append((alone_batch(inputs, sample).teacher.logprobs, inputs.teacher))
            if not is_one_pass(lm, config):
                select = alone_student(lm, config, inputs, row, sample.query_token_ids, sample.sample_id)
                pairs.append((select, inputs.select))
            worst.append(float(np.max([float(kl(alone, batched[row : row + 1])) for alone, batched in pairs])))
        return worst
