"""The best condition: what it is chosen by, in which cases its lead is resolved, and what its rule says."""

from __future__ import annotations

import re

import pytest

from cedkv.analysis.best import MAX_RULE_LENGTH, best_condition, listed, ranked
from cedkv.analysis.paired import n_needed
from cedkv.analysis.results import ConditionResult
from tests.support import making

ATTENTION = {"select.mode": "attention_diversity_span"}
DELIMITER = {"select.mode": "delimiter_span"}
DROP = {"select.mode": "causal_drop_span"}


def right(n: int, of: int) -> list[bool]:
    return [i < n for i in range(of)]


def best_label(results: list[ConditionResult]) -> str:
    best = best_condition(results).condition
    assert best is not None
    return best.label


def test_best_answers_most_among_candidates_that_pass() -> None:
    """A condition nearer to the teacher that answers less does not win, nor does a reference point or a failing candidate."""
    results = making.grid(
        (ATTENTION, {"correct": right(10, 40), "kl": 0.01}),
        (DELIMITER, {"correct": right(30, 40), "kl": 0.9}),
        (DROP, {"correct": True, "off": 5.0}),
        ({"select.mode": "oracle_span"}, {"correct": True}),
        n=40,
    )
    best = best_condition(results)
    assert best.condition is not None
    assert (best.condition.label, best.lead) == ("delimiter", "resolved")
    assert best.rule == (
        "highest accuracy, 0.75, of 2 candidates that pass gates A and B; resolved from all others (McNemar's exact test, Holm "
        "over 1 comparison)"
    )


def test_few_samples_resolve_nothing_and_the_rule_says_how_many_would() -> None:
    """5 against 2 right of 12: 0.42 is not resolved from 0.17."""
    results = making.grid((ATTENTION, {"correct": right(2, 12), "kl": 0.1}), (DELIMITER, {"correct": right(5, 12), "kl": 0.9}))
    best = best_condition(results)
    assert best.condition is not None
    assert (best.condition.label, best.lead) == ("delimiter", "unresolved")
    needed = n_needed([0.0, 0.0, 1.0, 1.0, 1.0, *[0.0] * 7])
    assert best.rule.endswith(
        "not resolved from any other candidate: n = 12 samples are too few to tell (McNemar's exact test, Holm over 1 "
        f"comparison); a single test needs {needed} of them"
    )


def test_holm_counts_the_other_candidates() -> None:
    """Nine discordant pairs of one kind (p = 0.004) are resolved from one other; p = 0.031 is not, among two comparisons."""
    conditions = [(ATTENTION, {"correct": right(20, 40)}), (DELIMITER, {"correct": right(11, 40)})]
    assert best_condition(making.grid(*conditions, n=40)).lead == "resolved"
    equal = [(ATTENTION, {"correct": right(20, 40)}), (DELIMITER, {"correct": right(14, 40)})]
    assert best_condition(making.grid(*equal, n=40)).lead == "resolved"
    best = best_condition(making.grid(*conditions, (DROP, {"correct": right(19, 40)}), n=40))
    assert best.lead == "unresolved"
    assert best.rule.endswith("; not resolved (McNemar's exact test, Holm over 2 comparisons, n = 40) from: causal_drop")
    both = best_condition(making.grid(*equal, (DROP, {"correct": right(14, 40)}), n=40))
    assert both.lead == "unresolved"
    assert "not resolved from any other candidate: n = 40 samples are too few" in both.rule


@pytest.mark.parametrize("labels", [True, False])
def test_equal_accuracies_are_decided_by_kl_among_labels_where_there_are_labels(labels: bool) -> None:
    near, far = ({"label_kl": 0.1}, {"label_kl": 0.3}) if labels else ({}, {})
    results = making.grid((ATTENTION, {"kl": 0.4, **far}), (DELIMITER, {"kl": 0.6, **near}))
    best = best_condition(results)
    assert best.condition is not None
    assert best.condition.label == ("delimiter" if labels else "attention_diversity")
    kl = "KL to teacher among labels, 0.1 nats" if labels else "KL to teacher, 0.4 nats"
    assert f"highest accuracy, 1 (of 2 with this accuracy the smallest mean {kl})" in best.rule
    assert best.rule.endswith("not resolved from any other candidate: n = 12 samples show no difference in accuracy")
    assert ranked(results)[0].label == best.condition.label


def test_a_kl_that_is_not_finite_does_not_win() -> None:
    nan = [float("nan"), *[0.1] * 11]
    results = making.grid((ATTENTION, {"kl": nan}), (DELIMITER, {"correct": right(6, 12)}))
    for condition in results:
        condition.results.verdicts.update(gateA=True, gateB=True)
    best = best_condition(results)
    assert best_label(results) == "delimiter"
    assert best.lead == "only"
    assert "the only candidate that passes gates A and B; there is no other" in best.rule


def test_a_rule_says_that_the_teacher_does_not_gain() -> None:
    taught, untaught = (
        best_condition(making.grid((ATTENTION, {"teacher": teacher}), (DELIMITER, {"teacher": teacher})))
        for teacher in (True, False)
    )
    caveat = "nothing is decided about the selection, as the teacher itself gains 0 on base; "
    assert untaught.rule == caveat + taught.rule


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("worst", [10, 38])
def test_rule_fits_its_tag(worst: int, teacher: bool) -> None:
    """Three selectors at eight budgets, resolved from one condition or from none; names that do not fit are counted."""
    settings = [{**mode, "select.span_budget": str(n)} for mode in (ATTENTION, DELIMITER, DROP) for n in range(1, 9)]
    shares = [39, worst, *[38] * (len(settings) - 2)]
    given = [{"correct": right(n, 40), "teacher": teacher} for n in shares]
    results = making.grid(*zip(settings, given, strict=True), n=40)
    rule = best_condition(results).rule
    assert len(rule) <= MAX_RULE_LENGTH
    ending = r"from: attention_diversity · .*, and \d+ more$" if worst == 10 else r"a single test needs \d+ of them$"
    assert re.search(ending, rule), rule


def test_no_gate_no_winner() -> None:
    results = making.grid((ATTENTION, {}), (DELIMITER, {}))
    for condition in results:
        condition.results.verdicts["gateA"] = False
    assert best_condition(results).condition is None
    for condition in results:
        condition.results.verdicts.update(gateA=True, gateB=False)
    assert "Gate A (none of them Gate B)" in best_condition(results).rule
    references = making.grid(({"select.mode": "full_demo"}, {}), ({"select.mode": "random_span"}, {}))
    assert best_condition(references).condition is None


def test_names_in_little_room() -> None:
    assert listed(["abc", "def"], 8) == "abc, def"
    assert listed(["abcdef", "ghijkl", "mnopqr"], 18) == "abcdef, and 2 more"
    assert listed(["abcdefgh"], 3) == "1 other"
    assert listed(["abcdefgh"] * 2, 3) == "2 others"
