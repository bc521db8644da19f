"""Each selector's own rule, by hand-made examples; what all of them share is in test_candidate_policy_center_restriction."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import SelectBlock
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.values import Evidence, Span
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from cedkv.selectors.base import SelectionTask, Selector, selector_class
from cedkv.testing import check_selector
from tests.support.making import select, task

_COUNT = itertools.count()
NAMES = list(SELECTORS.builtin)
ALL = pytest.mark.parametrize("name", NAMES)
SCORED = [name for name in NAMES if issubclass(selector_class(name), AttentionDiversitySpan)]
"""Greedy by a score that they ask for."""


def starts(name: str, given_: SelectionTask) -> list[int]:
    return [span.start for span in select(name, given_).spans]


def test_attention_is_greedy_under_the_distance() -> None:
    """Start 4 (mean 0.75) takes out 3 (0.625) and 5; of the rest 7 (0.5) and 1 (0.375) win over 2 and 0."""
    block = SelectBlock(span_len=2, span_budget=3, min_span_distance=2)
    chosen = select("attention_diversity_span", task("i" * 9, block, [0.9, 0.25, 0.5, 0.125, 1, 0.5, 0.125, 0.5, 0.5]))
    assert chosen.spans == (Span(1, 3, 0.375), Span(4, 6, 0.75), Span(7, 9, 0.5))


def test_attention_greedy_is_not_optimal_by_design() -> None:
    """The best single span goes first even where two others together would score more."""
    block = SelectBlock(span_len=1, span_budget=2, min_span_distance=2)
    assert starts("attention_diversity_span", task("iiiii", block, [0, 0.8, 0.9, 0.8, 0.1])) == [2, 4]


def test_first_token_does_not_count() -> None:
    """A sink holds most of the attention: the span that starts there would always be chosen, on every demo."""
    block = SelectBlock(span_len=3, span_budget=1)
    chosen = select("attention_diversity_span", task("iiiiii", block, [9.0, 0.125, 0.25, 0.25, 0.25, 0.25]))
    assert chosen.spans == (Span(2, 5, 0.25),)
    alone = SelectBlock(span_len=1, span_budget=1)
    assert select("attention_diversity_span", task("i", alone, [9.0])).spans == (Span(0, 1, 0.0),)


def test_first_token_is_left_out_of_the_mean_not_counted_as_zero() -> None:
    block = SelectBlock(span_len=2, span_budget=1)
    assert select("attention_diversity_span", task("iiaa", block, [9.0, 0.5, 0.3, 0.3])).spans == (Span(0, 2, 0.5),)


def test_causal_drop_order_is_its_own() -> None:
    """Attention says 0, the drop says 4 and then 2: attention must not decide."""
    block = SelectBlock(span_len=1, span_budget=2, min_span_distance=2)
    given_ = task("iiiii", block, [0, 9, 0, 9, 0], drops={0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3, 4: 0.5})
    assert select("causal_drop_span", given_).spans == (Span(2, 3, 0.4), Span(4, 5, 0.5))


@ALL
def test_selector_reads_what_it_declares_and_nothing_else(name: str) -> None:
    """What is not declared is not computed in a run. Zeros in its place would choose the first spans, and no one would see."""
    block = SelectBlock(span_len=1)
    given_ = task("idid", block, [0.1, 0.2, 0.3, 0.4])
    declared = {field: getattr(given_.evidence, field) for field in selector_class(name).needs}
    bare, enough = (replace(given_, evidence=Evidence(given_.evidence.attention, **known)) for known in ({}, declared))
    if declared:
        with pytest.raises((ValueError, DataError), match=f"{name} needs"):
            select(name, bare)
    assert select(name, enough).spans


@pytest.mark.parametrize("name", ["attention_diversity_span", "causal_drop_span"])
def test_ties_go_to_the_earlier_start(name: str) -> None:
    block = SelectBlock(span_len=2, span_budget=2, min_span_distance=3)
    assert starts(name, task("biiiiiiiii", block)) == [1, 4]


def test_delimiters_are_spread_evenly() -> None:
    """Nine delimiters, three spans: the first, the middle and the last, whatever the attention says."""
    block = SelectBlock(span_len=1, span_budget=3, min_span_distance=2)
    assert starts("delimiter_span", task("di" * 9, block)) == [0, 8, 16]
    assert starts("delimiter_span", task("di" * 9, block, [0.0] * 3 + [1.0] * 15)) == [0, 8, 16]


def test_delimiters_are_thinned_before_they_are_spread() -> None:
    """Neighbours closer than the distance count once: starts 0, 4, 8, 12 remain of 0, 1, 4, 5, ..."""
    block = SelectBlock(span_len=1, span_budget=4, min_span_distance=3)
    assert starts("delimiter_span", task("ddii" * 4, block)) == [0, 4, 8, 12]


def test_fewer_delimiters_than_budget() -> None:
    block = SelectBlock(span_len=2, span_budget=4, min_span_distance=1)
    assert starts("delimiter_span", task("idiiidi", block)) == [1, 5]
    assert starts("delimiter_span", task("iiiii", block)) == []
    centered = SelectBlock(span_len=2, span_budget=4, min_span_distance=1, center_policy="center")
    assert starts("delimiter_span", task("idiiidi", centered)) == [0, 4]


def test_random_is_uniform_over_candidates() -> None:
    """One span of five candidates, 1,200 draws: 240 each, give or take five standard deviations (14)."""
    block = SelectBlock(span_len=2, span_budget=1)
    counts = Counter(starts("random_span", task("iadidaia", block, trial=t))[0] for t in range(1200))
    assert set(counts) == {0, 2, 3, 4, 6}
    assert all(abs(count - 240) < 70 for count in counts.values())


def test_random_does_not_look_at_the_evidence() -> None:
    block = SelectBlock(span_len=2, span_budget=2, min_span_distance=2)
    one = starts("random_span", task("i" * 30, block, [0.0] * 30))
    other = starts("random_span", task("i" * 30, block, [0.0] * 15 + [9.0] * 15, drops={3: 9.0}))
    assert one == other


def test_random_fills_its_budget_where_it_can() -> None:
    """A draw that is thrown away for its distance is replaced, or random would keep fewer tokens than its rivals."""
    block = SelectBlock(span_len=2, span_budget=4, min_span_distance=2)
    assert {len(starts("random_span", task("i" * 40, block, trial=t))) for t in range(50)} == {4}


@ALL
@pytest.mark.parametrize(("letters", "sink", "always"), [("", 0, []), ("", 2, [0, 1]), ("b", 0, [0]), ("b", 2, [0, 1, 2])])
def test_bos_and_sinks_are_kept_by_every_selector(name: str, letters: str, sink: int, always: list[int]) -> None:
    """BOS is no sink of ``keep_sink``: with it, the first two tokens of the text itself are kept too."""
    chosen = select(name, task(f"{letters}aaaaaaaadi", SelectBlock(span_len=2, span_budget=1, keep_sink=sink)))
    in_spans = {token for span in chosen.spans for token in range(span.start, span.end)}
    assert chosen.spans
    assert chosen.kept_tokens == tuple(sorted(in_spans.union(always)))


@ALL
def test_more_sinks_than_demo(name: str) -> None:
    assert select(name, task("bdi", SelectBlock(span_len=2, span_budget=1, keep_sink=50))).kept_tokens == (0, 1, 2)


@ALL
@settings(max_examples=30, deadline=None, derandomize=True)
@given(letters=st.text(alphabet="ida", min_size=6, max_size=30), bos=st.booleans(), trial=st.integers(0, 99))
def test_same_task_same_selection_within_the_budget(name: str, letters: str, bos: bool, trial: int) -> None:
    """And the spans come out in the order of the text, whatever the order they were chosen in."""
    letters = f"{'b' * bos}{letters}"
    block = SelectBlock(span_len=2, span_budget=3, min_span_distance=2)
    scores = [float(7 * k % 5) for k in range(len(letters))]
    one, again = (select(name, task(letters, block, scores, trial)) for _ in range(2))
    assert one == again
    assert [span.start for span in one.spans] == sorted(span.start for span in one.spans)
    assert all(int(bos) <= span.start < span.end <= len(letters) for span in one.spans)
    assert not selector_class(name).bounded or len(one.kept_tokens) <= block.span_budget * block.span_len + bos


def test_full_demo_keeps_every_token() -> None:
    assert select("full_demo", task("bidaid", SelectBlock(span_len=1, span_budget=1))).spans == (Span(1, 6, 0.0),)
    assert not selector_class("full_demo").bounded


def test_sink_recent_keeps_both_ends() -> None:
    """Four first tokens and the last ones, as many as the budget allows; of a short demo everything, and no token twice."""
    block = SelectBlock(span_len=3, span_budget=2)
    assert select("sink_recent", task("b" + "i" * 20, block)).kept_tokens == (0, 1, 2, 3, 4, 19, 20)
    assert select("sink_recent", task("i" * 20, block)).kept_tokens == (0, 1, 2, 3, 18, 19)
    assert select("sink_recent", task("biiii", block)).spans == (Span(1, 5, 0.0),)
    assert select("sink_recent", task("iiiii", block)).spans == (Span(0, 4, 0.0), Span(4, 5, 0.0))
    assert select("sink_recent", task("i" * 20, SelectBlock(span_len=3, span_budget=1))).kept_tokens == (0, 1, 2)


def test_oracle_keeps_the_gold_tokens_up_to_the_budget() -> None:
    block = SelectBlock(span_len=2, span_budget=2)
    assert select("oracle_span", task("i" * 20, block, gold=(7, 10))).kept_tokens == (7, 8, 9)
    assert select("oracle_span", task("i" * 20, block, gold=(7, 15))).kept_tokens == (7, 8, 9, 10)


@pytest.mark.parametrize("name", SCORED)
def test_the_score_that_was_asked_for_decides(name: str) -> None:
    """And not the configured attention, which every selector is given too."""
    block = SelectBlock(span_len=1, span_budget=1)
    own, asked = [0.0, 9.0, 0.0, 0.0], np.array([9.0, 0.0, 0.5, 0.0])
    given_ = task("iiii", block, own, scores=asked)
    assert select(name, given_).spans == (Span(2, 3, 0.5),)
    assert selector_class(name)().worth(given_) is asked


def test_stratified_random_draws_one_span_a_stretch() -> None:
    block = SelectBlock(span_len=2, span_budget=4, min_span_distance=2)
    drawn = [starts("stratified_random_span", task("i" * 40, block, trial=t)) for t in range(40)]
    assert {tuple(start // 10 for start in chosen) for chosen in drawn} == {(0, 1, 2, 3)}
    assert len(set(map(tuple, drawn))) > 35
    assert starts("stratified_random_span", task("i" * 10 + "a" * 20 + "i" * 10, block))[-1] >= 30


def test_wrong_demo_is_chosen_as_the_configured_selector_would() -> None:
    """Only the prefix's owner is wrong: chosen in another way, it would differ in two respects."""
    given_ = task("iiiii", SelectBlock(span_len=1), [0, 0.8, 0.9, 0.8, 0.1])
    assert select("wrong_demo", given_) == select("attention_diversity_span", given_)
    assert [name for name in NAMES if selector_class(name).uses_partner] == ["wrong_demo"]


def test_points_of_reference_are_marked() -> None:
    """A point of reference that is not marked could win a comparison that it is only there to explain."""
    marked = {name for name in NAMES if selector_class(name).role != "candidate"}
    assert not marked & {"attention_diversity_span", "delimiter_span", "causal_drop_span"}
    assert marked >= {"full_demo", "sink_recent", "oracle_span", "transfer_span", "wrong_demo", "stratified_random_span"}
    assert [name for name in NAMES if selector_class(name).role == "oracle"] == ["oracle_span"]


@contextmanager
def registered(cls: type[Selector]) -> Iterator[None]:
    with patch.dict(SELECTORS._registered, {"broken": cls}), patch.dict(SELECTORS._loaded):
        yield


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (lambda task: [max(task.evidence.causal_drop)], "TypeError: .*; its needs declare attention alone"),
        (lambda task: [int(_COUNT.__next__()) % 4 + 1], "another choice for the same task"),
    ],
)
def test_the_contract_names_what_a_selector_breaks(choice: Callable[[SelectionTask], list[int]], message: str) -> None:
    class Broken(Selector):
        def choose(self, task: SelectionTask) -> tuple[Span, ...]:
            return tuple(Span(start, start + 2, 0.0) for start in choice(task))

    with registered(Broken), pytest.raises(AssertionError, match=message):
        check_selector("broken")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(-2, 6)], r"chose the span \[-2, 6\) of a demo whose tokens are \[1, 9\)"),
        ([(0, 2)], r"the span \[0, 2\)"),
        ([(7, 10)], r"the span \[7, 10\)"),
        ([(3, 3)], r"the span \[3, 3\)"),
        ([(1, 6)], "chose 5 tokens, the budget is span_budget x span_len = 4"),
    ],
)
def test_spans_that_no_prefix_can_hold_are_rejected(spans: list[tuple[int, int]], message: str) -> None:
    class Broken(Selector):
        def choose(self, task: SelectionTask) -> tuple[Span, ...]:
            return tuple(Span(start, end, 0.0) for start, end in spans)

    with registered(Broken), pytest.raises(ConfigError, match=message):
        select("broken", task("biiiiiiii", SelectBlock(span_len=2, span_budget=2)))


def test_a_selector_sees_the_evidence_that_it_declares_and_no_other() -> None:
    """In a grid another selector may have asked for it: an oracle's evidence must not reach a candidate."""

    @dataclass(frozen=True)
    class Broken(Selector):
        needs = frozenset({"span_drop"})

        def choose(self, task: SelectionTask) -> tuple[Span, ...]:
            given_fields = {field.name for field in fields(Evidence) if getattr(task.evidence, field.name) is not None}
            assert given_fields == {"attention", "scores", "span_drop"}
            return (Span(1, 3, 0.0),)

    everything = task("biiiiiiii", SelectBlock(span_len=2, span_budget=2))
    assert all(getattr(everything.evidence, field.name) is not None for field in fields(Evidence))
    with registered(Broken):
        assert starts("broken", everything) == [1]
