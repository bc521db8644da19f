"""The conditions of a comparison: what lists give, what they are called, and which lists are rejected."""

from __future__ import annotations

import pytest

from cedkv.conditions import LEFT_OUT, build_conditions, by_task, factors, labels
from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import EvalBlock, Phase2Config
from cedkv.core.errors import ConfigError
from tests.support import tiny
from tests.support.tasks import other_lookup


def config(*overrides: str) -> Phase2Config:
    return tiny.config("x", *overrides)


def names(comparison: str, *overrides: str, **lists: str) -> list[str]:
    return list(labels(build_conditions(comparison, config(*overrides), lists)).values())


def test_without_lists_every_selector_and_the_standard_questions() -> None:
    """The first condition is the configuration itself, and its scores are judged; budget, sinks by source, span length and
    positioning vary around it. What costs more than all others together is left out unless it is configured.
    """
    found = build_conditions("ablate_selector", Phase2Config(), {})
    assert found[0].config == Phase2Config(eval=EvalBlock(lds_masks=32))
    assert LEFT_OUT == ("greedy_teacher",)
    assert {c.config.select.mode for c in found} == set(SELECTORS.builtin) - {"greedy_teacher"}
    configured = build_conditions("ablate_selector", config("select.mode=greedy_teacher"), {})
    assert {c.config.select.mode for c in configured} == set(SELECTORS.builtin)
    plain = [c.config for c in found if c.config.select.mode == "attention_diversity_span"]
    eight = [c for c in plain if c.select.span_len == 8]
    assert sorted({c.select.span_budget for c in eight}) == [1, 2, 4, 8]
    sinks = {(c.select.keep_sink, c.prefix.kv_source) for c in eight if c.select.span_budget == 4}
    assert sinks == {(0, "prefill"), (0, "gather"), (4, "prefill"), (4, "gather")}
    assert {c.select.span_len: c.select.span_budget for c in plain if c.select.span_len != 8} == {4: 8, 16: 2}
    assert any(c.config.injection.positioning_mode == "absolute" and c.config.select.mode == "full_demo" for c in found)


def test_a_tight_prefix_leaves_out_what_does_not_fit() -> None:
    """The standard set of a configuration that fills its prefix must not end in an error."""
    for condition in build_conditions("ablate_selector", Phase2Config(prefix_len=32), {}):
        select = condition.config.select
        assert select.span_budget * select.span_len + select.keep_sink <= 32


def test_lists_are_multiplied_and_the_first_values_come_first() -> None:
    found = build_conditions("ablate_selector", config(), {"select_modes": "random_span,delimiter_span", "span_budgets": "2,1"})
    assert [(c.config.select.mode, c.config.select.span_budget) for c in found] == [
        ("random_span", 2), ("random_span", 1), ("delimiter_span", 2), ("delimiter_span", 1)
    ]  # fmt: skip
    assert [c.key for c in found][1] == "select.mode=random_span, select.span_budget=1"
    assert factors(found)[found[1].key] == {"select.mode": "random_span", "select.span_budget": 1}


def test_positioning_is_a_whole_grid_and_a_list_replaces_one_side_of_it() -> None:
    assert len(build_conditions("compare_positioning", config(), {})) == 16
    found = names("compare_positioning", padding_modes="null_pad", kv_sources="gather")
    assert found == ["compact · sink 0", "compact · sink 4", "absolute · sink 0", "absolute · sink 4"]


def test_labels_name_what_varies_and_are_unique() -> None:
    assert names("ablate_selector", select_modes="attention_diversity_span,random_span") == ["attention_diversity", "random"]
    assert names("ablate_selector", span_budgets="1,2", keep_sinks="0,4") == [
        "span_budget 1 · sink 0", "span_budget 1 · sink 4", "span_budget 2 · sink 0", "span_budget 2 · sink 4"
    ]  # fmt: skip
    standard = names("ablate_selector")
    assert len(set(standard)) == len(standard)
    assert standard[0] == "attention_diversity"
    assert {"attention_diversity · gather · sink 4", "full_demo · absolute"} <= set(standard)


def test_values_with_commas_of_their_own() -> None:
    found = build_conditions("ablate_selector", config(), {"selection_scopes": "[0,1],all, top50"})
    assert [c.config.layer_scope.selection for c in found] == [[0, 1], "all", "top50"]


def test_all_is_every_selector() -> None:
    assert [c.config.select.mode for c in build_conditions("ablate_selector", config(), {"select_modes": "all"})] == list(
        SELECTORS.builtin
    )


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"select_modes": "attention_diversity_span,random_spam"}, r"mode=random_spam.*did you mean 'random_span'\?"),
        ({"select_modes": "all,random_span"}, "'all' stands alone"),
        ({"select_modes": "random_span,random_span"}, "select_modes = .*'random_span' appears twice"),
        ({"span_budgets": "1,,2"}, "span_budgets = '1,,2': a value is empty"),
        ({"span_budgets": ""}, "span_budgets = '': a value is empty"),
        ({"span_budgets": "2,x"}, "condition select.span_budget=x: phase2.select.span_budget: value 'x' rejected"),
        ({"span_budgets": "2,40"}, "condition select.span_budget=40: .*= 160 tokens cannot fit prefix_len = 24"),
        ({"keep_sinks": "0"}, "at least two different conditions, the lists give 1"),
        ({"keep_sinks": "0,-0"}, "at least two different conditions, the lists give 1"),
    ],
)
def test_lists_that_are_rejected(lists: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_conditions("ablate_selector", config(), lists)


def test_a_default_list_that_does_not_fit_names_its_condition() -> None:
    """Four sinks are in compare_positioning's own lists; the user has not asked for them by name."""
    with pytest.raises(ConfigError, match=r"condition .*select\.keep_sink=4: .* = 16 tokens cannot fit prefix_len = 12"):
        build_conditions("compare_positioning", config("prefix_len=12"), {})


def test_scores_are_judged_by_masks_in_ablate_selector_alone() -> None:
    """32 masks unless a number is given, 0 included; the conditions' configurations have the number."""
    for given, masks in (((), 32), (("eval.lds_masks=0",), 0), (("eval.lds_masks=7",), 7)):
        for condition in build_conditions("ablate_selector", config(*given), {}):
            assert condition.config.eval.n_lds_masks == condition.config.eval.lds_masks == masks
    for condition in build_conditions("compare_positioning", config(), {}):
        assert (condition.config.eval.lds_masks, condition.config.eval.n_lds_masks) == (None, 0)
    assert not [name for name in names("ablate_selector") if "masks" in name]


def test_a_label_spells_a_switch_as_a_configuration_does() -> None:
    found = build_conditions("ablate_selector", Phase2Config(), {"null_queries": "false,true"})
    assert list(labels(found).values()) == ["null_query false", "null_query true"]


def test_tasks_repeat_the_conditions_and_reset_the_parameters_of_another_task() -> None:
    with other_lookup() as other:
        lists = {"tasks": f"{other},symbol_lookup", "select_modes": "random_span,delimiter_span"}
        found = build_conditions("ablate_selector", config(f"data.task={other}", "data.params={shift: 3}"), lists)
        assert [(c.config.data.task, c.config.select.mode) for c in found] == [
            (other, "random_span"), (other, "delimiter_span"), ("symbol_lookup", "random_span"),
            ("symbol_lookup", "delimiter_span"),
        ]  # fmt: skip
        assert [c.config.data.params for c in found] == [{"shift": 3}] * 2 + [{}] * 2
        assert found[2].key == "data.task=symbol_lookup, select.mode=random_span"
        assert list(labels(found).values()) == ["random", "delimiter"] * 2
        assert [len(group) for group in by_task(found).values()] == [2, 2]
        one_each = build_conditions("ablate_selector", config(), {**lists, "select_modes": "random_span"})
        assert list(labels(one_each).values()) == ["random", "random"]
        standard = build_conditions("ablate_selector", config(), {"tasks": f"symbol_lookup,{other}"})
        assert len(standard) == 2 * len(build_conditions("ablate_selector", config(), {}))
    with pytest.raises(ConfigError, match="did you mean 'symbol_lookup'"):
        build_conditions("ablate_selector", config(), {"tasks": "symbol_lokup"})


def test_conditions_of_one_task_are_one_group_without_a_name() -> None:
    found = build_conditions("compare_positioning", config(), {})
    assert by_task(found) == {"": found}
