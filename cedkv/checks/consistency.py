"""Gate A, first half: does the cache pipeline agree with itself on this very model?

Each check compares two ways to the same distribution (or the same tensor), on the run's own samples, through the functions
that the arms use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cedkv.checks.base import CheckInputs, MeasuredCheck
from cedkv.checks.reference import alone_base, alone_batch, alone_student, is_one_pass
from cedkv.checks.rotation import ROTATION_SHIFT, rotation_moves_queries
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Placement
from cedkv.inference.distributions import kl, log_softmax
from cedkv.inference.forward import left_padded, next_token_logprobs
from cedkv.inference.prefix import encode
from cedkv.inference.prefix_store import load_prefix, save_prefix
from cedkv.kv.cache import KVPrefix, assemble, cache_argument, output_cache
from cedkv.kv.positioning import place
from cedkv.models.fingerprint import prefix_fingerprint
from cedkv.models.loading import LanguageModel


def snapshot(prefix: KVPrefix) -> KVPrefix:
    """Return a copy of a prefix's tensors, to compare with after use."""
    return replace(prefix, keys=tuple(k.clone() for k in prefix.keys), values=tuple(v.clone() for v in prefix.values))


class TeacherIncremental(MeasuredCheck):
    """Demo cached, then query = one uncached pass.

    KL(incremental || teacher). The cache is the model's own growing one, none of this suite's.

    Why: every other check takes for granted that this model computes the same with a cache as without. Cannot see: what is
    wrong in both passes alike, such as the tokens themselves.
    """

    name, threshold = "teacher_incremental", "teacher_incremental_kl_max"
    counts_to_floor = certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return inputs.cached(self.name, lambda: self._measure(lm, inputs))

    @torch.inference_mode()
    def _measure(self, lm: LanguageModel, inputs: CheckInputs) -> list[float]:
        demos = [sample.demo_token_ids for sample in inputs.samples]
        kls = torch.empty(len(demos), dtype=inputs.teacher.dtype, device=inputs.teacher.device)

        def compute(rows: list[int]) -> torch.Tensor:
            ids, mask, positions = left_padded([demos[i] for i in rows], lm.device)
            demo = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
            query_ids, query_mask, query_positions = left_padded([inputs.queries[i] for i in rows], lm.device)
            query = lm.model(
                input_ids=query_ids,
                attention_mask=torch.cat([mask, query_mask], dim=1),
                position_ids=query_positions + mask.sum(dim=1, keepdim=True),
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(lm.model, output_cache(demo)),
            )
            return kl(log_softmax(query.logits[:, -1]), inputs.teacher[rows])

        for rows, values in lm.batching.passes([len(demo) for demo in demos], compute):
            kls[rows] = values
        return kls.tolist()


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


def _roundtrip(lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> tuple[list[float], list[float]]:
    """Save and load the prefixes.

    Returns:
        Per sample: KL(loaded || as it was) over KL(as it was || base); and how many of its tensors came back with another
        dtype, shape or bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        provenance = prefix_fingerprint(lm)
        save_prefix(inputs.prefix, inputs.placements, provenance, path)
        loaded = load_prefix(path, inputs.placements, provenance, lm.device).to_devices_of(inputs.prefix)
    injection = lm.injection_layers(config.layer_scope.injection)
    logprobs = next_token_logprobs(lm, inputs.queries, inputs.names, loaded, injection)
    changed = [0.0] * len(inputs.samples)
    tensors = [(*p.keys, *p.values, p.visible, p.query_start) for p in (loaded, inputs.prefix)]
    for after, before in zip(*tensors, strict=True):
        for row in range(len(changed)):
            changed[row] += after.dtype != before.dtype or not torch.equal(after[row], before[row])
    return (kl(logprobs, inputs.select) / (kl(inputs.select, inputs.base) + 1e-6)).tolist(), changed


class RoundtripRelKl(MeasuredCheck):
    """Prefix saved, loaded, injected = as it was.

    KL(loaded || as it was) over KL(as it was || base) + 1e-6.

    Why: a stored prefix has to mean the same when it is loaded. Cannot see: bits that move no answer (``roundtrip_exact``
    does), and whether what was saved is right.
    """

    name, unit, observation, threshold = "roundtrip_rel_kl", "ratio", "roundtrip", "roundtrip_rel_kl_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return inputs.cached_here("roundtrip", lambda: _roundtrip(lm, config, inputs))[0]


class RoundtripExact(MeasuredCheck):
    """Prefix saved and loaded = as it was, bit by bit.

    Why: a dtype that is a little narrower loses less than a KL shows. Cannot see: whether what was saved is right.
    """

    name, unit = "roundtrip_exact", "tensors"

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return inputs.cached_here("roundtrip", lambda: _roundtrip(lm, config, inputs))[1]

    def limit(self, config: Phase2Config) -> float:
        return 0.0


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
        lengths = [len(sample.demo_token_ids) for sample in inputs.samples]
        placements = [place(range(n), n, "absolute", "shrink_to_selected", n) for n in lengths]
        shift = self._shift(lm, inputs)
        moved = [
            replace(p, key_positions=tuple(q + shift for q in p.key_positions), query_start=p.query_start + shift)
            for p in placements
        ]
        worst = torch.zeros(len(inputs.samples), dtype=inputs.teacher.dtype, device=inputs.teacher.device)
        for source, placed in (("prefill", placements), ("gather", moved)):
            prefix = encode(lm, source, inputs.samples, placed, inputs.demo, range(len(inputs.samples)))
            worst = worst.maximum(kl(next_token_logprobs(lm, inputs.queries, inputs.names, prefix), inputs.teacher))
        return worst.tolist()

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


class SourceCacheUnchanged(MeasuredCheck):
    """Demo cache and prefix are the same after use.

    Largest absolute difference from the copies made before any arm ran over them. A pass over some rows may copy them out of
    the prefix, which would hide that it writes into its input; so one more pass runs over the prefixes themselves, in the
    order of their queries' lengths.

    Why: caches grow in place: a pass that writes into a shared one changes what comes after it. Cannot see: a cache that is
    wrong from the beginning.
    """

    name, unit, threshold = "source_cache_unchanged", "absolute", "source_cache_diff_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        order = sorted(range(len(inputs.samples)), key=lambda row: len(inputs.queries[row]))
        straight = inputs.prefix.rows(order)
        copy = snapshot(straight)
        injection = lm.injection_layers(config.layer_scope.injection)
        queries, names = [inputs.queries[row] for row in order], [inputs.names[row] for row in order]
        next_token_logprobs(lm, queries, names, straight, injection)
        worst = np.zeros(len(order))
        worst[order] = _differences(straight, copy)
        for after, before in zip((inputs.demo, inputs.prefix), inputs.untouched, strict=True):
            worst = np.maximum(worst, _differences(after, before))  # NaN stays NaN
        return worst.tolist()


def _differences(after: KVPrefix, before: KVPrefix) -> Sequence[float]:
    """Return the largest absolute difference of K and V per row; NaN where the shapes differ."""
    if after.keys[0].shape != before.keys[0].shape:
        return [float("nan")] * len(before.visible)
    worst = torch.zeros(len(before.visible), device=after.visible.device)
    for changed, original in zip(after.keys + after.values, before.keys + before.values, strict=True):
        worst = worst.maximum((changed - original).abs().float().flatten(1).max(dim=1).values.to(worst.device))
    return worst.tolist()
