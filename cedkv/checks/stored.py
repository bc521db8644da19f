"""Gate A: are prefixes the same after they were stored, loaded and used?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cedkv.checks.base import CheckInputs, MeasuredCheck
from cedkv.config.schema import Phase2Config
from cedkv.inference.distributions import kl
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.prefix_store import load_prefix, save_prefix
from cedkv.kv.cache import KVPrefix
from cedkv.kv.transfers import download
from cedkv.models.fingerprint import prefix_fingerprint
from cedkv.models.loading import LanguageModel


def snapshot(prefix: KVPrefix) -> KVPrefix:
    """Return a copy of a prefix's tensors, to compare with after use."""
    return replace(prefix, keys=tuple(k.clone() for k in prefix.keys), values=tuple(v.clone() for v in prefix.values))


class Loaded(NamedTuple):
    """What becomes of prefixes that are saved, loaded and used, per sample.

    relative: KL(loaded || as it was) over KL(as it was || base).
    changed: how many of its tensors came back with another dtype, shape or bit.
    used: largest absolute difference that the pass over the loaded prefixes left in them.
    """

    relative: list[float]
    changed: list[float]
    used: list[float]


def _loaded(lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> Loaded:
    """Return ``Loaded``, measured once: three checks share the pass over the loaded prefixes.

    A pass over some rows may copy them out of their prefixes, so rows are in the order of their queries' lengths, in which a
    pass takes them as they are.
    """
    return inputs.cached_here("loaded", lambda: _measure_loaded(lm, config, inputs))


def _measure_loaded(lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> Loaded:
    order = sorted(range(len(inputs.samples)), key=lambda row: len(inputs.queries[row]))
    before, placements = inputs.prefix.rows(order), [inputs.placements[row] for row in order]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        provenance = inputs.cached("prefix fingerprint", lambda: prefix_fingerprint(lm))
        save_prefix(before, placements, provenance, path)
        loaded = load_prefix(path, placements, provenance, lm.device).to_devices_of(before)
    tensors = [(*p.keys, *p.values, p.visible, p.query_start) for p in (loaded, before)]
    different = [_different_rows(there, here) for there, here in zip(*tensors, strict=True)]
    changed, relative, used = (np.zeros(len(order)) for _ in range(3))
    changed[order] = torch.stack(download(different)).sum(dim=0).tolist()
    copy = snapshot(loaded)
    injection = lm.injection_layers(config.layer_scope.injection)
    queries, names = [inputs.queries[row] for row in order], [inputs.names[row] for row in order]
    logprobs = next_token_logprobs(lm, queries, names, loaded, injection)
    used[order] = _differences(loaded, copy)
    select, base = inputs.select[order], inputs.base[order]
    relative[order] = (kl(logprobs, select) / (kl(select, base) + 1e-6)).tolist()
    return Loaded(relative.tolist(), changed.tolist(), used.tolist())


def _different_rows(there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Return which rows of a tensor came back as others, (B,) bool."""
    if there.dtype != here.dtype or there.shape != here.shape:
        return torch.ones(len(here), dtype=torch.bool, device=here.device)
    return (there != here).reshape(len(here), here[0].numel()).any(dim=1)


class RoundtripRelKl(MeasuredCheck):
    """Prefix saved, loaded, injected = as it was.

    KL(loaded || as it was) over KL(as it was || base) + 1e-6.

    Why: a stored prefix has to mean the same when it is loaded. Cannot see: bits that move no answer (``roundtrip_exact``
    does), and whether what was saved is right.
    """

    name, unit, observation, threshold = "roundtrip_rel_kl", "ratio", "roundtrip", "roundtrip_rel_kl_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return _loaded(lm, config, inputs).relative


class RoundtripExact(MeasuredCheck):
    """Prefix saved and loaded = as it was, bit by bit.

    Why: a dtype that is a little narrower loses less than a KL shows. Cannot see: whether what was saved is right.
    """

    name, unit = "roundtrip_exact", "tensors"

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        return _loaded(lm, config, inputs).changed

    def limit(self, config: Phase2Config) -> float:
        return 0.0


class SourceCacheUnchanged(MeasuredCheck):
    """Demo cache and prefix are the same after use.

    Largest absolute difference from the copies made before any arm ran over them. A pass over some rows may copy them out of
    the prefix, which would hide that it writes into its input; so the pass over the prefixes that were saved and loaded
    (``roundtrip_rel_kl``) runs over these themselves, and they are compared as well.

    Why: caches grow in place: a pass that writes into a shared one changes what comes after it. Cannot see: a cache that is
    wrong from the beginning.
    """

    name, unit, threshold = "source_cache_unchanged", "absolute", "source_cache_diff_max"
    certified = True

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        worst = np.array(_loaded(lm, config, inputs).used)
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
