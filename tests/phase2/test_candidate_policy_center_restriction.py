"""Where a span may be: anchored at an input or delimiter token, inside the demo, apart from the others, within budget."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import SelectBlock
from cedkv.selectors.base import candidates
from tests.support.making import kinds, select, task

NO_CANDIDATES = {"full_demo", "oracle_span", "sink_recent", "whole_shots", "entropy_gated_chunks"}
"""Selectors that are defined by where they look or by units of their own; a new one is held to the rules."""


def starts(letters: str, **settings_: object) -> list[int]:
    return [c.start for c in candidates(kinds(letters), SelectBlock.model_validate(settings_))]


def test_start_policy_by_hand() -> None:
    assert starts("diadida", span_len=2, center_policy="start") == [0, 1, 3, 4, 5]


def test_center_policy_by_hand() -> None:
    """The middle of an even span is its second half's first token: of ``[s, s+2)`` token s+1, of ``[s, s+3)`` too."""
    assert starts("diadida", span_len=2, center_policy="center") == [0, 2, 3, 4]
    assert starts("diadida", span_len=3, center_policy="center") == [0, 2, 3, 4]
    assert starts("aaada", span_len=4, center_policy="center") == [1]


def test_policies_agree_for_spans_of_one_token() -> None:
    letters = "bdiaadia"
    assert starts(letters, span_len=1, center_policy="start") == starts(letters, span_len=1, center_policy="center")


@pytest.mark.parametrize("policy", ["start", "center"])
def test_only_answers_no_candidate(policy: str) -> None:
    """A span anchored at an answer would hand the answer over by policy, not by evidence."""
    assert starts("baaaaaaaa", span_len=3, center_policy=policy) == []


@pytest.mark.parametrize("policy", ["start", "center"])
def test_bos_never_starts_a_span(policy: str) -> None:
    """BOS is kept anyway: a span that begins with it would spend budget on it."""
    assert starts("bddd", span_len=2, center_policy=policy) == [1, 2]


def test_no_span_runs_over_the_end() -> None:
    """A shortened last span would make selections of unequal size, and numbers that cannot be compared."""
    assert starts("iiiii", span_len=3) == [0, 1, 2]
    assert starts("iii", span_len=3) == [0]
    assert starts("ii", span_len=3) == []


def test_answers_inside_a_span_come_along() -> None:
    chosen = select(
        "attention_diversity_span", task("ddiaaadd", SelectBlock(span_len=4, span_budget=1), [0, 0, 1, 1, 1, 1, 0, 0])
    )
    assert chosen.kept_tokens == (2, 3, 4, 5)


def test_centered_span_may_start_at_an_answer() -> None:
    block = SelectBlock(span_len=3, span_budget=1, center_policy="center")
    assert select("attention_diversity_span", task("aida", block)).kept_tokens == (0, 1, 2)


@st.composite
def tasks(draw: st.DrawFn) -> tuple[str, SelectBlock, list[float], int]:
    letters = draw(st.sampled_from(["", "b"])) + draw(st.text(alphabet="ida", min_size=1, max_size=40))
    block = SelectBlock(
        span_len=draw(st.integers(1, 6)), span_budget=draw(st.integers(1, 5)), min_span_distance=draw(st.integers(1, 9)),
        center_policy=draw(st.sampled_from(["start", "center"])), keep_sink=draw(st.integers(0, 3)),
    )  # fmt: skip
    scores = st.lists(st.floats(0, 1), min_size=len(letters), max_size=len(letters))
    return letters, block, draw(scores), draw(st.integers(0, 1000))


@pytest.mark.parametrize("name", [name for name in SELECTORS.builtin if name not in NO_CANDIDATES])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(made=tasks())
def test_every_selector_keeps_the_rules(name: str, made: tuple[str, SelectBlock, list[float], int]) -> None:
    letters, block, scores, trial = made
    drops = {c.start: scores[c.start] for c in candidates(kinds(letters), block)}
    chosen = select(name, task(letters, block, scores, trial, drops))
    shift = 0 if block.center_policy == "start" else block.span_len // 2
    begins = [span.start for span in chosen.spans]

    assert all(letters[start + shift] in "id" for start in begins)
    assert all(letters[start] != "b" for start in begins)
    assert all(
        span.start >= 0 and span.end == span.start + block.span_len and span.end <= len(letters) for span in chosen.spans
    )
    assert all(right - left >= block.min_span_distance for left, right in pairwise(begins))
    assert len(begins) <= block.span_budget
    anchors = "d" if name == "delimiter_span" else "id"
    possible = [c for c in candidates(kinds(letters), block) if letters[c.start + shift] in anchors]
    assert bool(begins) == bool(possible)

    first = int(letters[0] == "b")
    always = set(range(min(first + block.keep_sink, len(letters))))
    assert set(chosen.kept_tokens) == always.union(*(range(span.start, span.end) for span in chosen.spans))
    assert list(chosen.kept_tokens) == sorted(set(chosen.kept_tokens))
