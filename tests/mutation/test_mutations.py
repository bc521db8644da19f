"""The mutation table: faults planted into the real code, and the check of Gate A that each is caught by.

A fault (``tests/mutation/planted``) changes one thing in an otherwise untouched run of a tiny model whose weights are scaled
up, so that positions and context matter. ``CAUGHT_BY`` says which check it makes ``fail``; without a fault all pass.

What no measurement on the model can see, because both sides would be computed alike, is caught by other means:

    attention of another layer, or not the mean over heads      the certificate (attention_rows), unit/kv/test_attention.py
    the wrong answer token, KL the other way round, arms mixed   oracle/test_outside_recomputation.py: every figure of a run
      up in the records                                          computed again from its artifacts by plain transformers
    percentiles, means, comparisons                              unit/test_metrics_phase2.py, unit/analysis/test_paired.py
    random draws that depend on order or company                 integration/test_engine.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cedkv.analysis.results import collect
from cedkv.checks.gates import gate_a
from cedkv.checks.probe import ROWS_LIMIT, run_probe
from tests.mutation.planted import Patch, Plant, precision, prefixes, samples
from tests.support import patch_points as points
from tests.support import tiny

GATHER, SINKS, SOME_LAYERS = "prefix.kv_source=gather", "select.keep_sink=3", "layer_scope.injection=[0,2]"


def verdicts(folder: Path, *overrides: str) -> dict[str, str]:
    """Gate A of a small run: check -> verdict."""
    records = collect(tiny.records(folder, *overrides))
    config = tiny.config(folder, *overrides)
    return {check.name: check.verdict for check in gate_a(config, records.on, records.plumbing, records.repro)}


CAUGHT_BY: list[tuple[Plant, str, tuple[str, ...]]] = [
    (prefixes.position_off_by_one, "keep_all_absolute", ()),
    (prefixes.query_not_behind_the_prefix, "keep_all_absolute", ()),
    (prefixes.query_on_the_last_kept_token, "selection_rules", ()),
    (prefixes.query_on_the_last_kept_token, "left_alone", ()),
    (prefixes.compact_where_absolute_is_asked, "selection_rules", ("injection.positioning_mode=absolute",)),
    (prefixes.keys_not_rotated, "first_layer", (GATHER,)),
    (prefixes.keys_not_rotated, "keep_all_absolute", ()),
    (prefixes.rotated_the_wrong_way, "first_layer", (GATHER,)),
    (prefixes.moved_by_row_0_s_shift, "first_layer", (GATHER,)),
    (prefixes.rotation_unlike_the_model_s, "rotation_equivariance", ()),
    (prefixes.gathered_off_by_one, "keep_all_absolute", ()),
    (prefixes.gathered_of_another_sample, "first_layer", (GATHER,)),
    (prefixes.nulls_not_masked, "null_effect", ()),
    (prefixes.mask_one_short, "keep_all_absolute", ()),
    (prefixes.padding_visible, "batch_consistency", ()),
    (prefixes.teacher_read_at_a_padded_slot, "batch_consistency", ()),
    (prefixes.keys_and_values_swapped, "keep_all_absolute", ()),
    (prefixes.prefix_in_the_wrong_layers, "keep_all_absolute", ()),
    (prefixes.hidden_from_the_wrong_layers, "unseen_layers", (SOME_LAYERS,)),
    (prefixes.use_changes_the_prefix, "source_cache_unchanged", ()),
    (prefixes.one_cache_for_all_passes, "batch_consistency", (GATHER,)),
    (prefixes.cache_of_an_earlier_prefix, "keep_all_absolute", ()),
    (prefixes.prefix_without_effect, "nonzero_effect", ()),
    (samples.swapped_samples, "left_alone", ()),
    (samples.states_swapped_for_the_whole_unit, "left_alone", ()),
    (samples.off_prompts_under_another_state, "off_alone", ()),
    (samples.off_prompts_under_another_state, "off_alone", (GATHER, SOME_LAYERS)),
    (samples.row_0_s_selection_for_all, "selection_rules", ()),
    (samples.row_0_s_attention_for_all, "attention_alone", ()),
    (samples.attention_off_by_one, "attention_alone", ()),
    (samples.keep_sink_ignored, "selection_rules", (SINKS,)),
    (samples.a_kept_token_lost, "selection_rules", ()),
    (samples.random_answers_are_select_s, "random_is_another", ()),
    (precision.bfloat16_passed_off_as_float32, "kv_precision", ()),
    (precision.bfloat16_passed_off_as_float32, "arithmetic", ()),
    (precision.products_in_bfloat16, "arithmetic", ()),
    (precision.prefix_kept_in(torch.bfloat16), "kv_precision", ()),
    (precision.prefix_kept_in(torch.float16), "kv_precision", ()),
    (precision.stored_in(torch.float8_e4m3fn), "roundtrip_rel_kl", ()),
    (precision.stored_in(torch.bfloat16), "roundtrip_exact", ()),
    (precision.stored_in(torch.float16), "roundtrip_exact", ()),
    (precision.stored_layers_swapped, "roundtrip_rel_kl", ()),
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
    samples.random_spans_are_select_s(monkeypatch)
    assert verdicts(llama_folder)["random_is_another"] == "insufficient"


@pytest.mark.parametrize("how", ["another layer", "one head"])
def test_attention_read_wrongly_is_for_the_certificate(llama_folder: Path, monkeypatch: Patch, how: str) -> None:
    _, lm = tiny.load(llama_folder)
    assert run_probe(lm).figures["attention_rows"] <= ROWS_LIMIT["float32"]
    if how == "one head":
        points.ATTENTION_ROWS.wrap(monkeypatch, lambda real, *arguments: real(*arguments)[:, :1])
    else:
        points.READ_ATTENTION.wrap(monkeypatch, lambda real, self, layer, *rest: real(self, (layer + 1) % 4, *rest))
    assert run_probe(lm).figures["attention_rows"] > ROWS_LIMIT["float32"]
