"""What must be answered, in tokens, and the answers that it is one of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cedkv.core.errors import UnusableSample
from cedkv.core.values import OnEpisode
from cedkv.tasks.shots import Question, Shot, ShotTemplate, episode_of
from cedkv.tasks.tokenize import AnswerMode, SampleTokenizer, tokenize_on
from tests.support import tiny, zoo

TEMPLATE = ShotTemplate.parse("Word: {input}\nSymbol: {output}\n\n")


def episode(
    answer: str = "blue", labels: tuple[str, ...] | None = None, outputs: tuple[str, ...] = ("red", "blue")
) -> OnEpisode:
    shots = [Shot(f"w{i}", output) for i, output in enumerate(outputs)]
    return episode_of("on-7", shots, Question("w1", answer, labels=labels), TEMPLATE)


@pytest.mark.parametrize("name", zoo.USABLE)
def test_answers_in_tokens(name: str) -> None:
    """whole: all that follows the query when the answer is written after it; first: the first of them."""
    tokenizer = zoo.made(name)
    made = episode("blue red")
    text = made.demo_text + made.query_text
    whole, first = (tokenize_on(SampleTokenizer.of(tokenizer, answer=mode), made) for mode in ("whole", "first"))
    everything = tokenizer(text + " blue red", add_special_tokens=False).input_ids
    own = whole.teacher_ids[int(whole.has_bos) :]
    assert [*own, *whole.answer_token_ids] == everything
    assert len(whole.answer_token_ids) == 2
    assert first.answer_token_ids == whole.answer_token_ids[:1] == (whole.answer_token_id,)
    assert first.teacher_ids == whole.teacher_ids


@pytest.mark.parametrize(
    ("mode", "answer", "reason", "message"),
    [
        ("single", "blue red", "answer is several tokens", r"is 2 tokens \['Ġblue', 'Ġred'\]; the answer must be exactly one"),
        ("whole", "", "answer without a token", r"is 0 tokens .* at least one token"),
        ("first", "", "answer without a token", r"is 0 tokens .* at least one token"),
        ("single", "", "answer without a token", r"is 0 tokens .* exactly one token"),
    ],
)
def test_answers_that_are_none(mode: AnswerMode, answer: str, reason: str, message: str) -> None:
    made = replace(episode(), answer_text=f" {answer}".rstrip())
    with pytest.raises(UnusableSample, match=rf"^sample on-7: answer_text .* {message}") as caught:
        tokenize_on(SampleTokenizer.of(tiny.tokenizer(), answer=mode), made)
    assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["single", "first", "whole"])
def test_answer_that_merges_with_the_query(mode: AnswerMode) -> None:
    made = replace(episode(), query_text="Word: w1\nSym", answer_text="bol")
    with pytest.raises(UnusableSample, match="merges with the end of query_text") as caught:
        tokenize_on(SampleTokenizer.of(tiny.tokenizer(), answer=mode), made)
    assert caught.value.reason == "answer merges with the query"


def labels_of(made: OnEpisode) -> set[str]:
    tokenizer = tiny.tokenizer()
    sample = tokenize_on(SampleTokenizer.of(tokenizer, answer="whole"), made)
    assert list(sample.label_token_ids) == sorted(set(sample.label_token_ids))
    assert not sample.label_token_ids or sample.answer_token_id in sample.label_token_ids
    return {tokenizer.decode([token]) for token in sample.label_token_ids}


def test_labels_that_are_given() -> None:
    """Whether the demo shows them or not, by their first tokens; the sample's own is always among them."""
    assert labels_of(episode(labels=("red", "blue", "green"))) == {" red", " blue", " green"}
    assert labels_of(episode("gold", labels=("red", "blue"))) == {" red", " blue", " gold"}
    assert labels_of(episode(labels=("red", "blue", "blue red"))) == {" red", " blue"}
    assert labels_of(episode(labels=("blue", "blue red"))) == set()
    assert labels_of(replace(episode(), labels=(" blue", "", " red"))) == {" red", " blue"}


def test_label_that_merges_with_the_query_is_left_out() -> None:
    made = replace(episode(), query_text="Word: w1\nSym", answer_text=" blue", labels=("bol", " red"))
    assert labels_of(made) == {" red", " blue"}


def test_symbols_of_an_episode_are_its_labels() -> None:
    """The demo's answers, where the own one is among them; answers of no known set are no labels."""
    assert labels_of(episode()) == {" red", " blue"}
    assert labels_of(episode("green red", outputs=("red", "blue"))) == set()
    assert labels_of(episode("blue", outputs=("blue", "blue"))) == set()
    assert labels_of(episode("blue red", outputs=("red red", "blue red"))) == {" red", " blue"}
    assert labels_of(episode("blue red", outputs=("red", "blue green"))) == set()


def test_labels_are_the_same_under_bos() -> None:
    made = episode(labels=("red", "blue", "green"))
    plain, bos = (tokenize_on(SampleTokenizer.of(tiny.tokenizer(bos)), made) for bos in (False, True))
    assert plain.label_token_ids == bos.label_token_ids
    symbols = replace(made, labels=None)
    plain, bos = (tokenize_on(SampleTokenizer.of(tiny.tokenizer(bos)), symbols) for bos in (False, True))
    assert plain.label_token_ids == bos.label_token_ids != ()
