"""An answer is asked for as the demo writes it; where it is not, the error says which spelling fits."""

from __future__ import annotations

import pytest

from cedkv.core.errors import UnusableSample
from cedkv.core.values import OnEpisode, OnSample
from cedkv.tasks.demo_answers import guess_kinds
from cedkv.tasks.tokenize import AnswerMode, SampleTokenizer, tokenize_on
from tests.support import tiny, zoo

DEMO, QUERY = "Word: dax\nSymbol: red\n\nWord: lug\nSymbol: blue\n\n", "Word: dax\nSymbol:"
OTHERWISE = "answer is written otherwise in the demo"


def sample(demo: str, query: str, answer: str, name: str = "", mode: AnswerMode = "single") -> OnSample:
    kinds = guess_kinds(demo, query, (answer,), unlisted=True)
    tokenizer = zoo.made(name) if name else tiny.tokenizer()
    return tokenize_on(SampleTokenizer.of(tokenizer, answer=mode), OnEpisode("on-7", demo, query, answer, kinds))


@pytest.mark.parametrize("mode", ["single", "first", "whole"])
@pytest.mark.parametrize(
    ("demo", "query", "answer", "fits"),
    [
        (DEMO, QUERY, "red", r"write answer_text as ' red'"),
        (DEMO, QUERY, "green", r"write answer_text as ' green'"),
        (DEMO, QUERY, "\nred", r"write answer_text as ' red'"),
        (DEMO, f"{QUERY} ", " red", r"write query_text without the white space at its end, and answer_text as ' red'"),
        (DEMO.replace("red", "Red"), QUERY, " red", r"write answer_text as ' Red', or the demo's answers as this one"),
        (DEMO.replace(": red", ":\nred").replace(": blue", ":\nblue"), QUERY, " red", r"write answer_text as '\\nred'"),
        (DEMO.replace(": red", ":\nred").replace(": blue", ":\nblue"), f"{QUERY}\n", " red", r"write answer_text as 'red'"),
        ("dax=red, lug=blue\n", "lug=", " blue", r"write answer_text as 'blue'"),
    ],
)
def test_an_answer_that_the_demo_writes_otherwise(demo: str, query: str, answer: str, fits: str, mode: AnswerMode) -> None:
    with pytest.raises(UnusableSample, match=rf"^sample on-7: answer_text .*; {fits}$") as caught:
        sample(demo, query, answer, mode=mode)
    assert caught.value.reason == OTHERWISE


@pytest.mark.parametrize("name", zoo.USABLE)
def test_every_kind_of_tokenizer_and_the_advice_is_right(name: str) -> None:
    """What fits is accepted; what does not says what does, and that is accepted then: no double space."""
    assert sample(DEMO, QUERY, " red", name).answer_as_shown
    with pytest.raises(UnusableSample, match=r"write answer_text as ' red'$"):
        sample(DEMO, QUERY, "red", name)
    with pytest.raises(UnusableSample, match=r"move the space from the end of query_text to the start of answer_text, ' red'$"):
        sample(DEMO, f"{QUERY} ", "red", name)


def test_labels_are_spelled_as_the_answers_are() -> None:
    kinds = guess_kinds(DEMO, QUERY, (" red",), unlisted=True)
    episode = OnEpisode("on-7", DEMO, QUERY, " red", kinds, labels=(" red", "blue"))
    with pytest.raises(UnusableSample, match=r"^sample on-7: label 'blue' follows .*; write label as ' blue'$"):
        tokenize_on(SampleTokenizer.of(tiny.tokenizer()), episode)


def test_another_unicode_form_is_shown_as_it_is_written() -> None:
    with pytest.raises(UnusableSample, match=r"the demo has ' cafe\\u0301'") as caught:
        sample(DEMO.replace("red", "cafe\u0301"), QUERY, " café", mode="whole")
    assert caught.value.reason == OTHERWISE


def test_an_answer_that_merges_with_what_follows_it() -> None:
    """The spelling is the same; what stands behind the demo's answers makes it another token."""
    demo = "Q:x A: a.\n\nQ:y A: a.\n\n"
    made = tiny.tokenizer(chat=False)
    made.add_tokens([".\n\n"])
    kinds = guess_kinds(demo, "Q:x A:", (" a.",), unlisted=True)
    episode = OnEpisode("on-7", demo, "Q:x A:", " a.", kinds)
    with pytest.raises(UnusableSample, match="put a line break behind the demo's answers, or another mark"):
        tokenize_on(SampleTokenizer.of(made, answer="whole"), episode)
    assert tokenize_on(SampleTokenizer.of(made, answer="first"), episode).answer_as_shown


@pytest.mark.parametrize(
    ("demo", "query", "answer", "as_shown"),
    [
        ("It is 'red' or blue.\n", "Which one? Answer:", " red", False),
        ("It is 'red' or red.\n", "Which one? Answer:", " red", True),
        ("Nothing of it.\n", "Which one? Answer:", " red", True),
        (DEMO, QUERY, " green", True),
    ],
)
def test_a_text_without_shots_is_only_noted(demo: str, query: str, answer: str, as_shown: bool) -> None:
    assert sample(demo, query, answer).answer_as_shown is as_shown


@pytest.mark.parametrize(
    ("demo", "query", "answer", "hint"),
    [
        ("x", "Symbol:", "blick", True),
        ("x", "Symbol:", " ★", False),
        (DEMO, QUERY, " ★", False),
        ("x", "Symbol:\n", "blick", False),
    ],
)
def test_a_leading_space_is_advised_where_there_is_none(demo: str, query: str, answer: str, hint: bool) -> None:
    with pytest.raises(UnusableSample, match=r"tokens \[.*\]; the answer must be exactly one token after the query") as caught:
        sample(demo, query, answer)
    assert ("often it needs a leading space" in str(caught.value)) is hint


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_a_blank_answer_is_none(answer: str) -> None:
    with pytest.raises(UnusableSample, match="the answer must be exactly one token") as caught:
        sample(DEMO, QUERY, answer)
    assert caught.value.reason == "answer without a token"
