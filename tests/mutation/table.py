"""The mutation table: a planted fault, the key of a check that it makes ``fail``, and the settings of the run.

Keys are those of the registry (``cedkv.checks.base``): ``gateA.name``, ``gateB.name``, ``precondition.name``, and for a finding
of the certificate ``certificate.name``, those that it shares with Gate A included.
"""

from __future__ import annotations

import torch

from tests.mutation.measuring import LEARNED, Overrides
from tests.mutation.planted import Plant, arms, attention, precision, prefixes, samples, weights

GATHER, SINKS, SOME_LAYERS = "prefix.kv_source=gather", "select.keep_sink=3", "layer_scope.injection=[0,2]"
REPLAY = "prefix.boundary_replay=2"
ABSOLUTE, ONE_OFF, WHOLE = "injection.positioning_mode=absolute", "eval.off_samples=1", "data.answer=whole"
NEXT_ONLY = "eval.off_tokens=0"
PRODUCTS_IN_FLOAT16 = precision.products_in(torch.float16)
PREFIX_KEPT_IN_FLOAT16 = precision.prefix_kept_in(torch.float16)
STORED_IN_BFLOAT16 = precision.stored_in(torch.bfloat16)
Row = tuple[Plant, str, Overrides]

GATE_A: list[Row] = [
    (prefixes.position_off_by_one, "gateA.keep_all_absolute", ()),
    (prefixes.query_not_behind_the_prefix, "gateA.keep_all_absolute", ()),
    (prefixes.query_on_the_last_kept_token, "gateA.selection_rules", ()),
    (prefixes.query_on_the_last_kept_token, "gateA.left_alone", ()),
    (prefixes.compact_where_absolute_is_asked, "gateA.selection_rules", (ABSOLUTE,)),
    (prefixes.keys_not_rotated, "gateA.first_layer", (GATHER,)),
    (prefixes.keys_not_rotated, "gateA.keep_all_absolute", ()),
    (prefixes.rotated_the_wrong_way, "gateA.first_layer", (GATHER,)),
    (prefixes.moved_by_row_0_s_shift, "gateA.first_layer", (GATHER,)),
    (prefixes.rotation_unlike_the_model_s, "gateA.rotation_equivariance", ()),
    (prefixes.keys_turned_by_other_angles, "gateA.rotation_equivariance", ()),
    (prefixes.gathered_off_by_one, "gateA.keep_all_absolute", ()),
    (prefixes.gathered_off_by_one_behind_a_gap, "gateA.first_layer", (GATHER,)),
    (prefixes.replayed_one_position_late, "gateA.boundary_replay", (GATHER, REPLAY)),
    (prefixes.replayed_tokens_see_later_ones, "gateA.boundary_replay", (GATHER, REPLAY)),
    (prefixes.replayed_tokens_one_slot_late, "gateA.boundary_replay", (GATHER, REPLAY)),
    (prefixes.last_layer_s_keys_of_row_0_for_all, "gateA.left_alone", (ONE_OFF,)),
    (prefixes.last_layer_s_keys_of_row_0_for_all, "gateA.batch_consistency", (GATHER, ONE_OFF)),
    (prefixes.gathered_of_another_sample, "gateA.first_layer", (GATHER,)),
    (prefixes.nulls_not_masked, "gateA.null_effect", ()),
    (prefixes.nulls_of_an_empty_row_not_masked, "gateA.null_effect", ()),
    (prefixes.null_pad_visible_in_the_arms, "gateA.padding_equivalence", (GATHER,)),
    (prefixes.mask_one_short, "gateA.keep_all_absolute", ()),
    (prefixes.padding_visible, "gateA.batch_consistency", ()),
    (prefixes.keys_and_values_swapped, "gateA.keep_all_absolute", ()),
    (prefixes.prefix_in_the_wrong_layers, "gateA.keep_all_absolute", ()),
    (prefixes.hidden_from_the_wrong_layers, "gateA.unseen_layers", (SOME_LAYERS,)),
    (prefixes.use_changes_the_prefix, "gateA.source_cache_unchanged", ()),
    (prefixes.use_rounds_the_prefix, "gateA.source_cache_unchanged", ()),
    (prefixes.one_cache_for_all_passes, "gateA.batch_consistency", (GATHER,)),
    (prefixes.cache_of_an_earlier_prefix, "gateA.keep_all_absolute", ()),
    (prefixes.prefix_without_effect, "gateA.nonzero_effect", ()),
    (attention.a_gap_in_the_teacher_s_positions, "gateA.teacher_incremental", ()),
    (attention.incremental_query_one_position_late, "gateA.teacher_incremental", ()),
    (attention.teacher_read_at_a_padded_slot, "gateA.batch_consistency", ()),
    (samples.swapped_samples, "gateA.left_alone", ()),
    (samples.states_swapped_for_the_whole_unit, "gateA.left_alone", ()),
    (samples.row_0_s_selection_for_all, "gateA.selection_rules", ()),
    (samples.row_0_s_attention_for_all, "gateA.attention_alone", ()),
    (samples.attention_off_by_one, "gateA.attention_alone", ()),
    (samples.attention_of_later_units_off_by_one, "gateA.attention_alone", ()),
    (samples.attention_of_later_units_off_by_one, "gateA.attention_alone", (GATHER,)),
    (samples.keep_sink_ignored, "gateA.selection_rules", (SINKS,)),
    (samples.a_kept_token_lost, "gateA.selection_rules", ()),
    (arms.off_prompts_under_another_state, "gateA.off_alone", (NEXT_ONLY,)),
    (arms.off_prompts_under_another_state, "gateA.off_alone", (GATHER, SOME_LAYERS, NEXT_ONLY)),
    (arms.off_prompts_of_later_units_under_another_state, "gateA.off_alone", (NEXT_ONLY,)),
    (arms.off_prompts_of_later_units_under_another_state, "gateA.off_further_alone", (GATHER,)),
    (arms.a_long_off_prompt_turns_those_beside_it, "gateA.off_alone", ()),
    (arms.answers_given_one_position_late, "gateA.answer_alone", (WHOLE, NEXT_ONLY)),
    (arms.answers_given_backwards, "gateA.answer_alone", (GATHER, WHOLE)),
    (arms.answers_given_one_position_late, "gateA.off_further_alone", ()),
    (arms.off_answers_compared_one_token_late, "gateA.off_further_alone", (SOME_LAYERS,)),
    (arms.off_answers_compared_one_token_late, "gateA.off_further_alone", ()),
    (arms.random_answers_are_select_s, "gateA.random_is_another", ()),
    (arms.base_answers_are_select_s, "gateA.nonzero_effect", ()),
    (arms.state_of_an_earlier_batch, "gateA.repro_tolerance", LEARNED),
    (precision.bfloat16_passed_off_as_float32, "gateA.kv_precision", ()),
    (precision.bfloat16_passed_off_as_float32, "gateA.arithmetic", ()),
    (precision.products_in(torch.bfloat16), "gateA.arithmetic", ()),
    (PRODUCTS_IN_FLOAT16, "gateA.arithmetic", ()),
    (precision.prefix_kept_in(torch.bfloat16), "gateA.kv_precision", ()),
    (PREFIX_KEPT_IN_FLOAT16, "gateA.kv_precision", ()),
    (precision.stored_in(torch.float8_e4m3fn), "gateA.roundtrip_rel_kl", ()),
    (STORED_IN_BFLOAT16, "gateA.roundtrip_exact", ()),
    (precision.stored_in(torch.float16), "gateA.roundtrip_exact", ()),
    (precision.stored_layers_swapped, "gateA.roundtrip_rel_kl", ()),
]
GATE_B: list[Row] = [
    (prefixes.prefix_without_effect, "gateB.on_gain", LEARNED),
    (prefixes.prefix_without_effect, "gateB.delta_on", LEARNED),
    (prefixes.keys_and_values_swapped, "gateB.rel_kl_to_teacher", LEARNED),
    (samples.states_swapped_for_the_whole_unit, "gateB.select_vs_random", LEARNED),
    (arms.select_answers_of_the_next_sample, "gateB.on_gain", LEARNED),
    (arms.select_answers_of_the_next_sample, "gateB.rel_kl_to_teacher", LEARNED),
    (arms.select_at_another_temperature, "gateB.rel_kl_to_teacher", LEARNED),
    (arms.a_query_token_for_the_answer, "gateB.on_gain", LEARNED),
    (arms.select_counted_as_wrong, "gateB.on_gain", LEARNED),
    (arms.kl_as_a_mean_over_the_vocabulary, "gateB.delta_on", LEARNED),
    (arms.base_answers_are_select_s, "gateB.delta_on", LEARNED),
    (arms.off_kl_in_bits, "gateB.off_delta_p99", LEARNED),
    (arms.off_prompts_compared_with_the_next_one_alone, "gateB.off_delta_p99", LEARNED),
    (arms.select_and_random_swapped, "gateB.select_vs_random", LEARNED),
]
PRECONDITIONS: list[Row] = [
    (arms.teacher_counted_as_base, "precondition.teacher_gain", LEARNED),
    (arms.base_answers_are_select_s, "precondition.teacher_gain", LEARNED),
    (arms.entropy_as_a_mean_over_the_vocabulary, "precondition.off_entropy", LEARNED),
]
CERTIFICATE: list[Row] = [
    (weights.a_layer_left_out, "certificate.weights_without_place", ()),
    (weights.a_layer_read_as_zeros, "certificate.weights_are_weights", ()),
    (attention.scaled_scores, "certificate.left_alone", ()),
    (arms.all_arms_at_another_temperature, "certificate.left_alone", ()),
    (prefixes.prefix_at_wrong_positions, "certificate.left_alone", ()),
    (prefixes.a_place_by_slot, "certificate.slots_have_no_place", ()),
    (prefixes.gathered_off_by_one_behind_a_gap, "certificate.slots_have_no_place", ()),
    (attention.seen_where_hidden, "certificate.hidden_prefix", ()),
    (prefixes.hidden_from_the_wrong_layers, "certificate.hidden_prefix", ()),
    (attention.read_one_key_late, "certificate.attention_rows", ()),
    (attention.read_in_another_layer, "certificate.attention_rows", ()),
    (attention.read_of_one_head, "certificate.attention_rows", ()),
    (attention.window_ignored, "certificate.attention_rows", ()),
    (attention.value_norms_of_another_head, "certificate.value_norms", ()),
    (attention.a_gap_in_the_teacher_s_positions, "certificate.teacher_incremental", ()),
    (attention.incremental_query_one_position_late, "certificate.teacher_incremental", ()),
    (prefixes.nulls_of_an_empty_row_not_masked, "certificate.null_effect", ()),
    (precision.stored_layers_swapped, "certificate.roundtrip", ()),
    (prefixes.keys_not_rotated, "certificate.keep_all_absolute", ()),
    (prefixes.null_pad_visible_in_the_arms, "certificate.padding_equivalence", ()),
    (prefixes.padding_visible, "certificate.batch_consistency", ()),
    (prefixes.keys_turned_by_other_angles, "certificate.rotation_equivariance", ()),
    (prefixes.rotation_unlike_the_model_s, "certificate.rotation_equivariance", ()),
    (prefixes.use_changes_the_prefix, "certificate.source_cache_unchanged", ()),
]
TABLE = GATE_A + GATE_B + PRECONDITIONS + CERTIFICATE
OUTSIDE: list[Plant] = [
    attention.window_ignored,
    attention.null_query_not_subtracted,
    attention.value_norms_of_another_head,
]
"""Faults in how a score is made, which no check of a run sees: its evidence agrees with itself."""

ALONE: dict[str, Plant] = {
    "gateA.teacher_incremental": attention.incremental_query_one_position_late,
    "gateA.null_effect": prefixes.nulls_of_an_empty_row_not_masked,
    "gateA.nonzero_effect": arms.base_answers_are_select_s,
    "gateA.roundtrip_exact": STORED_IN_BFLOAT16,
    "gateA.repro_tolerance": arms.state_of_an_earlier_batch,
    "gateA.keep_all_absolute": prefixes.gathered_off_by_one,
    "gateA.padding_equivalence": prefixes.null_pad_visible_in_the_arms,
    "gateA.batch_consistency": prefixes.last_layer_s_keys_of_row_0_for_all,
    "gateA.attention_alone": samples.attention_off_by_one,
    "gateA.selection_rules": samples.a_kept_token_lost,
    "gateA.kv_precision": PREFIX_KEPT_IN_FLOAT16,
    "gateA.source_cache_unchanged": prefixes.use_rounds_the_prefix,
    "gateA.arithmetic": PRODUCTS_IN_FLOAT16,
    "gateA.left_alone": prefixes.last_layer_s_keys_of_row_0_for_all,
    "gateA.first_layer": prefixes.gathered_off_by_one_behind_a_gap,
    "gateA.boundary_replay": prefixes.replayed_tokens_see_later_ones,
    "gateA.unseen_layers": prefixes.hidden_from_the_wrong_layers,
    "gateA.off_alone": arms.off_prompts_under_another_state,
    "gateA.answer_alone": arms.answers_given_one_position_late,
    "gateA.off_further_alone": arms.off_answers_compared_one_token_late,
    "gateA.rotation_equivariance": prefixes.keys_turned_by_other_angles,
    "gateA.random_is_another": arms.random_answers_are_select_s,
    "gateB.off_delta_p99": arms.off_kl_in_bits,
    "gateB.delta_on": arms.kl_as_a_mean_over_the_vocabulary,
    "gateB.rel_kl_to_teacher": arms.select_at_another_temperature,
    "precondition.teacher_gain": arms.teacher_counted_as_base,
    "certificate.weights_without_place": weights.a_layer_left_out,
    "certificate.weights_are_weights": weights.a_layer_read_as_zeros,
    "certificate.left_alone": arms.all_arms_at_another_temperature,
    "certificate.slots_have_no_place": prefixes.gathered_off_by_one_behind_a_gap,
    "certificate.hidden_prefix": attention.seen_where_hidden,
    "certificate.attention_rows": attention.read_one_key_late,
    "certificate.value_norms": attention.value_norms_of_another_head,
    "certificate.teacher_incremental": attention.incremental_query_one_position_late,
    "certificate.null_effect": prefixes.nulls_of_an_empty_row_not_masked,
    "certificate.roundtrip": precision.stored_layers_swapped,
    "certificate.keep_all_absolute": prefixes.keys_not_rotated,
    "certificate.rotation_equivariance": prefixes.keys_turned_by_other_angles,
    "certificate.source_cache_unchanged": prefixes.use_changes_the_prefix,
}
"""Check -> a fault that no other check of the run, or of the certificate, fails on: without this check it would pass."""
NEVER_ALONE: dict[str, str] = {
    "gateA.roundtrip_rel_kl": "what moves the answer moves a bit as well, which roundtrip_exact sees",
    "gateB.on_gain": "base answers nothing here, so select without gain answers nothing, and select_vs_random compares nothing",
    "gateB.select_vs_random": "a select arm below random spans, which know nothing here, does not gain on base either",
    "precondition.off_entropy": "off_delta_p99 decides nothing where base is certain of the next token",
    "certificate.padding_equivalence": "null slots that take part move the select arm away from the model left alone",
    "certificate.batch_consistency": "the model left alone runs row by row, so left_alone sees a batch that disturbs its rows",
}
"""Checks whose faults others see too, and why."""
FLOOR_BASED = {"gateA.nonzero_effect", "gateA.random_is_another"}
"""Checks with a limit in multiples of the numerical floor, which rises with any check that counts to it."""
