"""The mutation table: faults planted into the real code, and the check of Gate A that each is caught by.

A fault changes one thing in an otherwise untouched run of a tiny model whose weights are scaled up, so that positions and
context matter. ``CAUGHT_BY`` says which check it makes ``fail``; without a fault all pass.

What no measurement on the model can see, because both sides would be computed alike, is caught by other means:

    attention of another layer, or not the mean over heads      the certificate (attention_rows), tests/lm/test_attention.py
    the wrong answer token, KL the other way round, arms mixed   tests/test_outside_recomputation.py: every figure of a run
      up in the records                                          computed again from its artifacts by plain transformers
    percentiles, means, comparisons                              tests/test_metrics.py, tests/test_stats.py
    random draws that depend on order or company                 tests/test_engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cedkv import arms, eval_phase2, plumbing, positioning
from cedkv.certificate import ROWS_LIMIT
from cedkv.gates import gate_a
from cedkv.lm import attention, cache, scoring, teacher
from cedkv.lm import prefix as prefix_module
from cedkv.lm.attention import HiddenPrefix
from cedkv.lm.cache import PrefixBatch
from cedkv.probe import probe
from cedkv.report.build import sort_records
from cedkv.types import Placement
from tests import tiny

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
GATHER, SINKS, SOME_LAYERS = "prefix.kv_source=gather", "select.keep_sink=3", "layer_scope.injection=[0,2]"


def verdicts(folder: Path, *overrides: str) -> dict[str, str]:
    """Gate A of a small run: check -> verdict."""
    records = sort_records(tiny.records(folder, *overrides))
    config = tiny.config(folder, *overrides)
    return {check.name: check.verdict for check in gate_a(config, records.on, records.plumbing, records.repro)}


def wrap(patch: Patch, module: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace ``module.name`` by ``change(real, *its arguments)``."""
    real = getattr(module, name)
    patch.setattr(module, name, lambda *given, **named: change(real, *given, **named))


# positions and rotation


def position_off_by_one(patch: Patch) -> None:
    wrap(patch, prefix_module, "prefill",
         lambda real, lm, rows, at, names: real(lm, rows, [[p + 1 for p in row] for row in at], names))  # fmt: skip


def query_not_behind_the_prefix(patch: Patch) -> None:
    wrap(patch, scoring, "_over", lambda real, model, device, rows, prefix, *rest, **more: real(
        model, device, rows, replace(prefix, query_start=prefix.query_start * 0), *rest, **more))  # fmt: skip


def query_on_the_last_kept_token(patch: Patch) -> None:
    patch.setitem(positioning.POSITIONING, "compact", lambda kept, length: (tuple(range(len(kept))), len(kept) - 1))


def compact_where_absolute_is_asked(patch: Patch) -> None:
    patch.setitem(positioning.POSITIONING, "absolute", positioning.compact)


def keys_not_rotated(patch: Patch) -> None:
    patch.setattr(cache, "rotate_keys", lambda keys, shift, rotation: keys)


def rotated_the_wrong_way(patch: Patch) -> None:
    wrap(patch, cache, "rotate_keys", lambda real, keys, shift, rotation: real(keys, -shift, rotation))


def moved_by_row_0_s_shift(patch: Patch) -> None:
    wrap(patch, cache, "rotate_keys", lambda real, keys, shift, rotation: real(keys, shift[:1].expand_as(shift), rotation))


def rotation_unlike_the_model_s(patch: Patch) -> None:
    for module in (cache, plumbing):
        wrap(patch, module, "rotate_keys", lambda real, keys, shift, rotation: real(
            keys, shift, replace(rotation, inv_freq=rotation.inv_freq.flip(0))))  # fmt: skip


def gathered_off_by_one(patch: Patch) -> None:
    def shifted(real: Any, source: Any, rows: Any, placements: Any, rotations: Any) -> Any:
        before = [replace(p, kept_tokens=tuple(max(0, token - 1) for token in p.kept_tokens)) for p in placements]
        return real(source, rows, before, rotations)

    wrap(patch, prefix_module, "gather", shifted)


def gathered_of_another_sample(patch: Patch) -> None:
    wrap(patch, prefix_module, "gather", lambda real, source, rows, *rest: real(source, [*rows[1:], rows[0]], *rest))


# masks, layers, keys and values


def nulls_not_masked(patch: Patch) -> None:
    def unmasked(real: Any, *given: Any) -> PrefixBatch:
        made = real(*given)
        return replace(made, visible=torch.ones_like(made.visible))

    for module in (arms, prefix_module, plumbing):
        wrap(patch, module, "assemble", unmasked)


def mask_one_short(patch: Patch) -> None:
    """The last kept token is masked out."""

    def short(real: Any, lm: Any, rows: Any, prefix: PrefixBatch | None, layers: Any) -> Any:
        if prefix is not None:
            last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
            prefix = replace(prefix, visible=prefix.visible & ~last)
        return real(lm, rows, prefix, layers)

    for module in (scoring, teacher):
        wrap(patch, module, "last_logits", short)


def padding_visible(patch: Patch) -> None:
    def seen(real: Any, rows: Any, device: Any) -> Any:
        ids, mask, positions = real(rows, device)
        return ids, torch.ones_like(mask), positions

    wrap(patch, scoring, "left_padded", seen)


def teacher_read_at_a_padded_slot(patch: Patch) -> None:
    """Short rows are aligned at their start, and read at the batch's last slot all the same."""

    def right(real: Any, rows: Any, device: Any) -> Any:
        return tuple(
            torch.stack(
                [torch.roll(row, int(mask.sum()) - len(row)) for row, mask in zip(part, real(rows, device)[1], strict=True)]
            )
            for part in real(rows, device)
        )

    wrap(patch, teacher, "left_padded", right)


def keys_and_values_swapped(patch: Patch) -> None:
    for module in (arms, prefix_module):
        wrap(patch, module, "assemble", lambda real, keys, values, placements: real(values, keys, placements))


def prefix_in_the_wrong_layers(patch: Patch) -> None:
    def reversed_(real: Any, self: PrefixBatch) -> DynamicCache:
        return real(replace(self, keys=self.keys[::-1], values=self.values[::-1]))

    real = PrefixBatch.fresh_cache
    patch.setattr(PrefixBatch, "fresh_cache", lambda self: reversed_(real, self))


def hidden_from_the_wrong_layers(patch: Patch) -> None:
    wrap(patch, scoring, "HiddenPrefix",
         lambda real, slots, layers: HiddenPrefix(slots, frozenset(range(4)) - layers))  # fmt: skip


# caches that are not fresh


def use_changes_the_prefix(patch: Patch) -> None:
    real = PrefixBatch.fresh_cache

    def stale(self: PrefixBatch) -> DynamicCache:
        made = real(self)
        self.keys[0][:, :, 0] += 1e-3
        return made

    patch.setattr(PrefixBatch, "fresh_cache", stale)


def one_cache_for_all_passes(patch: Patch) -> None:
    """The object of the pass before, which has grown."""
    real, kept = PrefixBatch.fresh_cache, {}
    patch.setattr(PrefixBatch, "fresh_cache", lambda self: kept.setdefault(self.keys[0].shape, real(self)))


def cache_of_an_earlier_prefix(patch: Patch) -> None:
    """The K/V of the first prefix of the same shape."""
    real, kept = PrefixBatch.fresh_cache, {}
    patch.setattr(PrefixBatch, "fresh_cache", lambda self: real(kept.setdefault(self.keys[0].shape, self)))


def prefix_without_effect(patch: Patch) -> None:
    wrap(patch, scoring, "last_logits", lambda real, lm, rows, prefix, layers: real(lm, rows, None, None))


# one sample's things for another


def swapped_samples(patch: Patch) -> None:
    def swapped(real: Any, lm: Any, rows: Any, prefix: PrefixBatch | None, layers: Any) -> Any:
        n = len(rows)
        prefix = prefix.rows([(i + 1) % n for i in range(n)]) if prefix is not None and n > 1 else prefix
        return real(lm, rows, prefix, layers)

    wrap(patch, scoring, "last_logits", swapped)


def states_swapped_for_the_whole_unit(patch: Patch) -> None:
    """Every query runs under the next sample's state, in whatever passes."""

    def swapped(real: Any, batch: Any, config: Any, prefix: PrefixBatch) -> Any:
        n = len(batch.samples)
        return real(batch, config, prefix.rows([(i + 1) % n for i in range(n)]))

    wrap(patch, arms, "answer", swapped)


def off_prompts_under_another_state(patch: Patch) -> None:
    wrap(patch, eval_phase2, "_off",
         lambda real, batch, config, off, owners, state: real(batch, config, off, owners[1:] + owners[:1], state))  # fmt: skip


def row_0_s_selection_for_all(patch: Patch) -> None:
    def first(real: Any, batch: Any, config: Any, known: Any, mode: str, purpose: str, trial: int) -> Any:
        made = real(batch, config, known, mode, purpose, trial)
        if purpose != "select":
            return made
        chosen, slots, selections, placements = made.selections[0], made.placements[0].slots, [], []
        for sample in batch.samples:
            kept = tuple(token for token in chosen.kept_tokens if token < len(sample.demo_token_ids))
            selections.append(replace(chosen, kept_tokens=kept))
            placements.append(Placement(kept, tuple(range(len(kept))), len(kept), slots))
        return replace(made, selections=selections, placements=placements)

    wrap(patch, arms, "choose", first)


def row_0_s_attention_for_all(patch: Patch) -> None:
    def first(real: Any, batch: Any, config: Any) -> Any:
        known = real(batch, config)
        fitting = [torch.zeros(len(its.attention)).double().numpy() for its in known]
        for own in fitting:
            n = min(len(own), len(known[0].attention))
            own[:n] = known[0].attention[:n]
        return [replace(its, attention=own) for its, own in zip(known, fitting, strict=True)]

    wrap(patch, arms, "evidence", first)


def attention_off_by_one(patch: Patch) -> None:
    """In padded rows the demo is looked for one slot too early."""

    def early(real: Any, self: Any, part: Any, seen: Any, demos: Any, queries: Any) -> None:
        real(self, part, seen, [(max(0, start - 1), end - (start > 0)) for start, end in demos], queries)

    real = teacher._Attention.add
    patch.setattr(teacher._Attention, "add", lambda self, *given: early(real, self, *given))


def keep_sink_ignored(patch: Patch) -> None:
    wrap(patch, arms.selectors, "select", lambda real, name, task: real(
        name, replace(task, select=task.select.model_copy(update={"keep_sink": 0}))))  # fmt: skip


def a_kept_token_lost(patch: Patch) -> None:
    def lost(real: Any, name: str, task: Any) -> Any:
        made = real(name, task)
        return replace(made, kept_tokens=made.kept_tokens[:-1])

    wrap(patch, arms.selectors, "select", lost)


def random_answers_are_select_s(patch: Patch) -> None:
    first: dict[int, Any] = {}
    wrap(patch, arms, "answer", lambda real, batch, *rest: first.setdefault(id(batch), real(batch, *rest)))


def random_spans_are_select_s(patch: Patch) -> None:
    wrap(patch, arms, "choose", lambda real, batch, config, known, mode, purpose, trial: real(
        batch, config, known, config.select.mode, "select", 0))  # fmt: skip


# precision


def loaded(patch: Patch, change: Callable[[Any], None]) -> None:
    """Change the model right after it was loaded."""

    def changed(real: Any, config: Any) -> Any:
        lm = real(config)
        change(lm)
        return lm

    wrap(patch, tiny.source, "load", changed)


def bfloat16_passed_off_as_float32(patch: Patch) -> None:
    loaded(patch, lambda lm: lm.model.to(torch.bfloat16))


def products_in_bfloat16(patch: Patch) -> None:
    """Inputs of every linear layer are rounded, what comes out is float32."""

    def change(lm: Any) -> None:
        for layer in lm.model.modules():
            if type(layer) is torch.nn.Linear:
                real = layer.forward
                layer.forward = lambda rows, _real=real: _real(rows.to(torch.bfloat16).to(rows.dtype))

    loaded(patch, change)


def prefix_kept_in(dtype: torch.dtype) -> Plant:
    def plant(patch: Patch) -> None:
        def narrow(tensors: Any) -> Any:
            return tuple(tensor.to(dtype).to(tensor.dtype) for tensor in tensors)

        wrap(patch, arms, "assemble", lambda real, keys, values, placed: real(narrow(keys), narrow(values), placed))

    plant.__name__ = f"prefix_kept_in_{str(dtype)[6:]}"
    return plant


def stored_in(dtype: torch.dtype) -> Plant:
    def plant(patch: Patch) -> None:
        wrap(patch, plumbing, "save_prefix", lambda real, prefix, *rest: real(
            replace(prefix, keys=tuple(k.to(dtype).to(k.dtype) for k in prefix.keys)), *rest))  # fmt: skip

    plant.__name__ = f"stored_in_{str(dtype)[6:]}"
    return plant


def stored_layers_swapped(patch: Patch) -> None:
    wrap(patch, plumbing, "save_prefix", lambda real, prefix, *rest: real(replace(prefix, keys=prefix.keys[::-1]), *rest))


CAUGHT_BY: list[tuple[Plant, str, tuple[str, ...]]] = [
    (position_off_by_one, "keep_all_absolute", ()),
    (query_not_behind_the_prefix, "keep_all_absolute", ()),
    (query_on_the_last_kept_token, "selection_rules", ()),
    (query_on_the_last_kept_token, "left_alone", ()),
    (compact_where_absolute_is_asked, "selection_rules", ("injection.positioning_mode=absolute",)),
    (keys_not_rotated, "first_layer", (GATHER,)),
    (keys_not_rotated, "keep_all_absolute", ()),
    (rotated_the_wrong_way, "first_layer", (GATHER,)),
    (moved_by_row_0_s_shift, "first_layer", (GATHER,)),
    (rotation_unlike_the_model_s, "rotation_equivariance", ()),
    (gathered_off_by_one, "keep_all_absolute", ()),
    (gathered_of_another_sample, "first_layer", (GATHER,)),
    (nulls_not_masked, "null_effect", ()),
    (mask_one_short, "keep_all_absolute", ()),
    (padding_visible, "batch_consistency", ()),
    (teacher_read_at_a_padded_slot, "batch_consistency", ()),
    (keys_and_values_swapped, "keep_all_absolute", ()),
    (prefix_in_the_wrong_layers, "keep_all_absolute", ()),
    (hidden_from_the_wrong_layers, "unseen_layers", (SOME_LAYERS,)),
    (use_changes_the_prefix, "source_cache_unchanged", ()),
    (one_cache_for_all_passes, "batch_consistency", (GATHER,)),
    (cache_of_an_earlier_prefix, "keep_all_absolute", ()),
    (prefix_without_effect, "nonzero_effect", ()),
    (swapped_samples, "left_alone", ()),
    (states_swapped_for_the_whole_unit, "left_alone", ()),
    (off_prompts_under_another_state, "off_alone", ()),
    (off_prompts_under_another_state, "off_alone", (GATHER, SOME_LAYERS)),
    (row_0_s_selection_for_all, "selection_rules", ()),
    (row_0_s_attention_for_all, "attention_alone", ()),
    (attention_off_by_one, "attention_alone", ()),
    (keep_sink_ignored, "selection_rules", (SINKS,)),
    (a_kept_token_lost, "selection_rules", ()),
    (random_answers_are_select_s, "random_is_another", ()),
    (bfloat16_passed_off_as_float32, "kv_precision", ()),
    (bfloat16_passed_off_as_float32, "arithmetic", ()),
    (products_in_bfloat16, "arithmetic", ()),
    (prefix_kept_in(torch.bfloat16), "kv_precision", ()),
    (prefix_kept_in(torch.float16), "kv_precision", ()),
    (stored_in(torch.float8_e4m3fn), "roundtrip_rel_kl", ()),
    (stored_in(torch.bfloat16), "roundtrip_exact", ()),
    (stored_in(torch.float16), "roundtrip_exact", ()),
    (stored_layers_swapped, "roundtrip_rel_kl", ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "check", "overrides"), CAUGHT_BY, ids=[f"{plant.__name__}-{check}" for plant, check, _ in CAUGHT_BY]
)
def test_planted_fault_is_caught(
    llama_folder: Path, monkeypatch: Patch, plant: Plant, check: str, overrides: tuple[str, ...]
) -> None:
    plant(monkeypatch)
    assert verdicts(llama_folder, *overrides)[check] == "fail"


@pytest.mark.parametrize("overrides", sorted({given for _, _, given in CAUGHT_BY}), ids=str)
def test_without_a_fault_everything_passes(model_folder: Path, overrides: tuple[str, ...]) -> None:
    found = verdicts(model_folder, *overrides)
    assert set(found.values()) == {"pass"}
    assert found.keys() >= {check for _, check, given in CAUGHT_BY if given == overrides}


def test_random_spans_that_are_the_selected_ones_decide_nothing(llama_folder: Path, monkeypatch: Patch) -> None:
    """Nothing tells a fault from a demo with one choice only; either way the comparison with random says nothing."""
    random_spans_are_select_s(monkeypatch)
    assert verdicts(llama_folder)["random_is_another"] == "insufficient"


@pytest.mark.parametrize("how", ["another layer", "one head"])
def test_attention_read_wrongly_is_for_the_certificate(llama_folder: Path, monkeypatch: Patch, how: str) -> None:
    _, lm = tiny.load(llama_folder)
    assert probe(lm).figures["attention_rows"] <= ROWS_LIMIT["float32"]
    if how == "one head":
        wrap(monkeypatch, attention, "attention_rows", lambda real, *given: real(*given)[:, :1])
    else:
        real = attention.AttentionReader.read
        monkeypatch.setattr(attention.AttentionReader, "read", lambda self, layer, *rest: real(self, (layer + 1) % 4, *rest))
    assert probe(lm).figures["attention_rows"] > ROWS_LIMIT["float32"]
