"""Gate A on planted faults: each is caught, by the check that is there for it. Without a fault, every check passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv import plumbing
from cedkv.conditions import Condition
from cedkv.eval_phase2 import plan, run
from cedkv.gates import gate_a
from cedkv.lm import prefix as prefix_module
from cedkv.lm import scoring
from cedkv.lm.cache import PrefixBatch
from cedkv.report.build import sort_records
from cedkv.samples.load import load_samples
from tests import tiny

Plant = Callable[[pytest.MonkeyPatch, Any], None]


def failed_checks(folder: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant | None) -> set[str]:
    config, lm = tiny.load(folder)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    if plant is not None:
        plant(monkeypatch, lm)
    grid = [Condition("run", config)]
    units = plan(grid, len(samples.on), 0, "1.5")
    found = [r for _, records in run(lm, grid, samples, units, "1.5", lambda *_: None) for r in records["run"]]
    records = sort_records(found)
    return {c.name for c in gate_a(config, records.on, records.plumbing, records.repro) if c.verdict != "pass"}


def position_off_by_one(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    real = prefix_module.prefill

    def shifted(lm: Any, rows: Any, positions: Any, names: Any) -> Any:
        return real(lm, rows, [[p + 1 for p in row] for row in positions], names)

    monkeypatch.setattr(prefix_module, "prefill", shifted)


def unrotated_keys(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    monkeypatch.setattr(plumbing, "rotate_keys", lambda keys, shift, inv_freq: keys)


def rotated_the_wrong_way(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    real = plumbing.rotate_keys
    monkeypatch.setattr(plumbing, "rotate_keys", lambda keys, shift, inv_freq: real(keys, -shift, inv_freq))


def gathered_off_by_one(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    real = prefix_module.gather

    def shifted(source: Any, rows: Any, placements: Any, inv_freq: Any) -> Any:
        before = [replace(p, kept_tokens=tuple(max(0, token - 1) for token in p.kept_tokens)) for p in placements]
        return real(source, rows, before, inv_freq)

    monkeypatch.setattr(prefix_module, "gather", shifted)


def nulls_not_masked(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    for module in (prefix_module, plumbing):
        real = module.assemble

        def unmasked(*given: Any, _real: Any = real) -> PrefixBatch:
            made = _real(*given)
            return replace(made, visible=torch.ones_like(made.visible))

        monkeypatch.setattr(module, "assemble", unmasked)


def mask_one_short(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    """The last kept token is masked out."""
    real = scoring.last_logits

    def short(lm: Any, rows: Any, prefix: PrefixBatch | None, layers: Any) -> Any:
        if prefix is not None:
            last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
            prefix = replace(prefix, visible=prefix.visible & ~last)
        return real(lm, rows, prefix, layers)

    monkeypatch.setattr(scoring, "last_logits", short)


def swapped_samples(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    """Every query runs under its neighbour's prefix."""
    real = scoring.last_logits

    def swapped(lm: Any, rows: Any, prefix: PrefixBatch | None, layers: Any) -> Any:
        n = len(rows)
        prefix = prefix.rows([(i + 1) % n for i in range(n)]) if prefix is not None and n > 1 else prefix
        return real(lm, rows, prefix, layers)

    monkeypatch.setattr(scoring, "last_logits", swapped)


def use_changes_the_prefix(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    """A stale cache: what a pass leaves behind is there in the next one."""
    real = PrefixBatch.fresh_cache

    def stale(self: PrefixBatch) -> Any:
        cache = real(self)
        self.keys[0][:, :, 0] += 1e-3
        return cache

    monkeypatch.setattr(PrefixBatch, "fresh_cache", stale)


def lossy_store(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    real = plumbing.save_prefix

    def lossy(prefix: PrefixBatch, *rest: Any) -> None:
        real(replace(prefix, keys=tuple(k.to(torch.float8_e4m3fn).to(k.dtype) for k in prefix.keys)), *rest)

    monkeypatch.setattr(plumbing, "save_prefix", lossy)


def bfloat16_passed_off_as_float32(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    lm.model.to(torch.bfloat16)


def prefix_without_effect(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    """The student ignores its prefix and its place: nothing of it reaches the answer."""
    real = scoring.last_logits
    monkeypatch.setattr(scoring, "last_logits", lambda lm, rows, prefix, layers: real(lm, rows, None, None))


CAUGHT_BY: dict[Plant, str] = {
    position_off_by_one: "keep_all_absolute",
    gathered_off_by_one: "keep_all_absolute",
    unrotated_keys: "rotation_equivariance",
    rotated_the_wrong_way: "rotation_equivariance",
    nulls_not_masked: "null_effect",
    mask_one_short: "keep_all_absolute",
    swapped_samples: "batch_consistency",
    use_changes_the_prefix: "source_cache_unchanged",
    lossy_store: "roundtrip_rel_kl",
    bfloat16_passed_off_as_float32: "rotation_equivariance",
    prefix_without_effect: "nonzero_effect",
}


@pytest.mark.parametrize(("plant", "check"), CAUGHT_BY.items(), ids=[plant.__name__ for plant in CAUGHT_BY])
def test_planted_fault_is_caught(model_folder: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, check: str) -> None:
    assert check in failed_checks(model_folder, monkeypatch, plant)


def test_without_a_fault_everything_passes(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed_checks(model_folder, monkeypatch, None) == set()
