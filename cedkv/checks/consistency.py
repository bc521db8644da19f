"""Gate A's measurements: does the cache pipeline hold on this very model?

Each figure compares two ways to the same distribution (or the same tensor), on the run's own samples, through the same
functions the arms use. Limits and verdicts are in ``gates.py``; here are only observations, one value a sample.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cedkv.checks.reference import CheckInputs, base_alone, in_one_pass, teacher_alone
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Placement
from cedkv.inference.forward import kl, left_padded, log_softmax, next_token_logprobs, prefill
from cedkv.inference.prefix import encode
from cedkv.inference.prefix_store import load_prefix, save_prefix
from cedkv.kv.cache import KVPrefix, assemble
from cedkv.kv.positioning import place
from cedkv.kv.rope import rerotate_keys
from cedkv.models.fingerprint import prefix_fingerprint
from cedkv.models.loading import LanguageModel

ROTATION_SHIFT = 37
"""Positions by which keys are moved in the rotation check: odd, and beyond the shortest rotary wavelengths."""
ROTATION_TOKENS = 32
"""First demo tokens whose keys are moved; their keys do not depend on the condition."""


def snapshot(prefix: KVPrefix) -> KVPrefix:
    """A copy of a prefix's tensors, to compare with after use."""
    return replace(
        prefix, keys=tuple(k.clone() for k in prefix.keys), values=tuple(v.clone() for v in prefix.values)
    )  # fmt: skip


def measure(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> dict[str, list[float]]:
    """All observations of a batch: check name -> one value a sample. KL in nats, the rest relative or absolute."""
    injection = str(config.layer_scope.injection)
    found = {
        "teacher_incremental": given.cached("teacher_incremental", lambda: teacher_incremental(lm, given)),
        "null_effect": given.cached(("null_effect", config.prefix_len, injection), lambda: null_effect(lm, config, given)),
        "keep_all_absolute": given.cached("keep_all_absolute", lambda: keep_all(lm, given)),
        "padding_equivalence": padding_equivalence(lm, config, given),
        "batch_consistency": batch_consistency(lm, config, given),
    }
    found["roundtrip"], found["roundtrip_exact"] = roundtrip(lm, config, given)
    if lm.rope_layouts is not None:
        found["rotation_equivariance"] = given.cached("rotation", lambda: rotation_equivariance(lm, given))
    found["source_cache_unchanged"] = source_cache_unchanged(lm, config, given)
    return found


@torch.inference_mode()
def teacher_incremental(lm: LanguageModel, given: CheckInputs) -> list[float]:
    """KL(demo cached, then query || one uncached pass): the model's own growing cache, no cache of ours."""
    demos = [sample.demo_token_ids for sample in given.samples]
    out = torch.empty(len(demos), dtype=given.teacher.dtype, device=given.teacher.device)

    def compute(part: list[int]) -> torch.Tensor:
        ids, mask, positions = left_padded([demos[i] for i in part], lm.device)
        first = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        more_ids, more_mask, more = left_padded([given.queries[i] for i in part], lm.device)
        second = lm.model(
            input_ids=more_ids,
            attention_mask=torch.cat([mask, more_mask], dim=1),
            position_ids=more + mask.sum(dim=1, keepdim=True),
            past_key_values=first.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        return kl(log_softmax(second.logits[:, -1]), given.teacher[part])

    for part, found in lm.batching.passes([len(demo) for demo in demos], compute):
        out[part] = found
    return out.tolist()


def null_effect(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """KL(an all-null prefix of prefix_len slots, then the query || base)."""
    empty = [Placement((), (), 0, config.prefix_len) for _ in given.samples]
    nothing = assemble(tuple(k[:, :, :0] for k in given.prefix.keys), tuple(v[:, :, :0] for v in given.prefix.values), empty)
    rows = [sample.base_ids for sample in given.samples]
    return kl(
        next_token_logprobs(lm, rows, given.names, nothing, lm.injection_layers(config.layer_scope.injection)), given.base
    ).tolist()


def roundtrip(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> tuple[list[float], list[float]]:
    """KL(prefix saved and loaded || prefix as it was) over KL(prefix as it was || base); and how many of its tensors came back
    with another dtype, shape or bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        made_by = prefix_fingerprint(lm)
        save_prefix(given.prefix, given.placements, made_by, path)
        loaded = load_prefix(path, given.placements, made_by, lm.device).to_devices_of(given.prefix)
    again = next_token_logprobs(lm, given.queries, given.names, loaded, lm.injection_layers(config.layer_scope.injection))
    changed = [0.0] * len(given.samples)
    tensors = [(*prefix.keys, *prefix.values, prefix.visible, prefix.query_start) for prefix in (loaded, given.prefix)]
    for now, before in zip(*tensors, strict=True):
        for row in range(len(changed)):
            changed[row] += now.dtype != before.dtype or not torch.equal(now[row], before[row])
    return (kl(again, given.select) / (kl(given.select, given.base) + 1e-6)).tolist(), changed


def keep_all(lm: LanguageModel, given: CheckInputs) -> list[float]:
    """KL(every demo token kept at its place, in all layers || teacher): the larger of prefill and gather.

    Where keys can be moved, those that are gathered move with the query, all by as much: which changes nothing either.
    """
    lengths = [len(sample.demo_token_ids) for sample in given.samples]
    placements = [place(range(n), n, "absolute", "shrink_to_selected", n) for n in lengths]
    room = lm.capabilities.max_positions - max(len(sample.teacher_ids) for sample in given.samples)
    by = 0 if lm.rope_layouts is None else min(ROTATION_SHIFT, room)
    moved = [
        replace(p, key_positions=tuple(at + by for at in p.key_positions), query_start=p.query_start + by) for p in placements
    ]
    worst = torch.zeros(len(given.samples), dtype=given.teacher.dtype, device=given.teacher.device)
    for kv_source, placed in (("prefill", placements), ("gather", moved)):
        prefix = encode(lm, kv_source, given.samples, placed, given.demo, range(len(given.samples)))
        worst = worst.maximum(kl(next_token_logprobs(lm, given.queries, given.names, prefix), given.teacher))
    return worst.tolist()


def padding_equivalence(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """KL(the other padding mode || this one)."""
    other = "shrink_to_selected" if config.prefix.padding_mode == "null_pad" else "null_pad"
    slots = [max(config.prefix_len, n) if other == "null_pad" else n for n in (len(p.kept_tokens) for p in given.placements)]
    placements = [replace(p, slots=n) for p, n in zip(given.placements, slots, strict=True)]
    longest = max(len(p.kept_tokens) for p in placements)
    prefix = assemble(
        tuple(k[:, :, :longest] for k in given.prefix.keys), tuple(v[:, :, :longest] for v in given.prefix.values), placements
    )
    return kl(
        next_token_logprobs(lm, given.queries, given.names, prefix, lm.injection_layers(config.layer_scope.injection)),
        given.select,
    ).tolist()


def batch_consistency(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """KL(each sample in a batch of its own || the batch used): the largest of base, teacher and select.

    Where a student is one uncached pass, ``left_alone`` has the select arm's.
    """
    injection = lm.injection_layers(config.layer_scope.injection)
    out = []
    for row, (sample, owner, placement) in enumerate(zip(given.samples, given.owners, given.placements, strict=True)):
        pairs = [(base_alone(lm, given, sample), given.base), (teacher_alone(lm, given, sample).logprobs, given.teacher)]
        if not in_one_pass(lm, config):
            demo = teacher_alone(lm, given, owner).demo
            prefix = encode(lm, config.prefix.kv_source, [owner], [placement], demo, [0])
            select = next_token_logprobs(lm, [sample.query_token_ids], [sample.sample_id], prefix, injection)
            pairs.append((select, given.select))
        out.append(float(np.max([float(kl(one, many[row : row + 1])) for one, many in pairs])))
    return out


def rotation_equivariance(lm: LanguageModel, given: CheckInputs) -> list[float]:
    """Largest |K at p+d - R(d) K at p| over the largest |K|, over layers, of each demo's first tokens run at p and at p+d.

    Each token runs alone, and so sees nothing but itself wherever it is: every layer gets the same input both times, and what
    differs is what rotating differs by. (In company, deeper layers also differ by what rounding made of the scores before
    them, which grows with depth.) That is at most 6 roundings: products and sum of a pair are 3 half roundings of the
    pair's length, in each of its two numbers, at p and at p+d, and one more is the moved key's own. (More in float32, where
    the model's angles are rounded as well; and where an attention sink takes its share of a token alone.)
    """
    counts = [min(ROTATION_TOKENS, len(sample.demo_token_ids)) for sample in given.samples]
    rows = [[token] for sample, n in zip(given.samples, counts, strict=True) for token in sample.demo_token_ids[:n]]
    owners = np.repeat(np.arange(len(counts)), counts)
    names = [given.names[owner] for owner in owners]
    at = [p for n in counts for p in range(n)]
    by = min(ROTATION_SHIFT, lm.capabilities.max_positions - max(counts))
    keys, _ = prefill(lm, rows, [[p] for p in at], names)
    moved, _ = prefill(lm, rows, [[p + by] for p in at], names)
    shift = torch.full((len(rows), 1), by, device=lm.device)
    worst = [0.0] * len(counts)
    for key, expected, rotation in zip(keys, moved, lm.rope_layouts or (), strict=True):
        difference = (rerotate_keys(key, shift, rotation) - expected).float().abs()
        for sample in range(len(counts)):
            its = torch.from_numpy(owners == sample).to(key.device)
            off = difference[its].max() / expected[its].float().abs().max()
            worst[sample] = float(np.maximum(worst[sample], float(off)))  # NaN stays NaN
    return worst


def source_cache_unchanged(lm: LanguageModel, config: Phase2Config, given: CheckInputs) -> list[float]:
    """Largest absolute difference between demo caches and prefixes now, and their copies from before their first use.

    Rows are picked out of a prefix by copying, which could hide a pass that writes into what it was given; so one more
    pass runs straight over the prefixes, in the order of their queries' lengths, which needs no picking.
    """
    order = sorted(range(len(given.samples)), key=lambda row: len(given.queries[row]))
    straight = given.prefix.rows(order)
    copy = snapshot(straight)
    injection = lm.injection_layers(config.layer_scope.injection)
    next_token_logprobs(lm, [given.queries[row] for row in order], [given.names[row] for row in order], straight, injection)
    worst = np.zeros(len(order))
    worst[order] = _differences(straight, copy)
    for now, before in zip((given.demo, given.prefix), given.untouched, strict=True):
        worst = np.maximum(worst, _differences(now, before))  # NaN stays NaN
    return worst.tolist()


def _differences(now: KVPrefix, before: KVPrefix) -> list[float]:
    """Largest absolute difference of K and V, a value a row; NaN where the shapes differ."""
    if now.keys[0].shape != before.keys[0].shape:
        return [float("nan")] * len(before.visible)
    worst = torch.zeros(len(before.visible), device=now.visible.device)
    for after, first in zip(now.keys + now.values, before.keys + before.values, strict=True):
        worst = worst.maximum((after - first).abs().float().flatten(1).max(dim=1).values.to(worst.device))
    return worst.tolist()
