"""Which samples a run gets: unusable ones are all counted, and left out only where the configuration says so."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from tokenizers import AddedToken

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.texts import OffText, SampleTexts
from tests.support import tiny

DEMO, QUERY = "Word: dax\nSymbol: red\n\nWord: lug\nSymbol: blue\n\n", "Word: dax\nSymbol:"
GOOD = ("", QUERY, " red")
SEVERAL, BOUNDARY, LONG = (" red", QUERY, " red blue"), (" re", "d" + QUERY, " red"), (" red" * 200, QUERY, " red")
REASONS = {SEVERAL: "answer is several tokens", BOUNDARY: "boundary inside a token", LONG: "longer than the model's context"}
OFF = tuple(OffText(f"off-{i}", f"What is {i}?") for i in range(3))


@dataclass(frozen=True)
class Given(Task):
    """The episodes of a test, each with a demo of its own: what the demo ends with, the query, the answer."""

    texts: Iterable[tuple[str, str, str]]

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        for i, (end, query, answer) in enumerate(self.texts):
            yield OnEpisode(f"on-{i}", f"{i}.\n{DEMO}{end}", query, answer, ())

    def source(self, request: TaskRequest) -> str:
        return "given"


def load(texts: Iterable[tuple[str, str, str]], *overrides: str, off: tuple[OffText, ...] = OFF, chat: bool = True) -> Samples:
    sizes = [f"eval.off_samples={len(off) or 1}", "eval.off_tokens=0"]
    config = tiny.config("nowhere", *sizes, *overrides)
    return load_samples(config, tiny.tokenizer(chat=chat), 180, 500, SampleTexts(Given(texts), off))


def test_every_unusable_sample_is_counted() -> None:
    """By reason, with the first ids, the first one's message and what helps."""
    texts = [GOOD, SEVERAL, BOUNDARY, *[SEVERAL] * 7, LONG]
    with pytest.raises(DataError) as caught:
        load(texts, "eval.on_samples=11")
    said = str(caught.value)
    assert said.startswith("10 of 11 ON samples cannot be used: 8 x answer is several tokens ('on-1', 'on-3', ")
    assert "'on-6', ...), 1 x boundary inside a token ('on-2'), 1 x longer than the model's context ('on-10')" in said
    assert "The first: sample on-1: answer_text ' red blue' is 2 tokens" in said
    assert said.endswith(
        "data.answer=whole or first takes answers of several tokens; data.verbalizer gives labels words; "
        "data.unusable=skip leaves such samples out, and counts them"
    )


def test_only_the_samples_of_the_run_are_looked_at() -> None:
    assert len(load([GOOD, GOOD, SEVERAL], "eval.on_samples=2").on) == 2
    assert len(load([SEVERAL, ("", QUERY, " blue")], "eval.on_samples=2", "data.answer=first").on) == 2


def test_first_tokens_that_tell_no_two_answers_apart_are_rejected() -> None:
    """An arm that knew only how answers begin would be right every time."""
    with pytest.raises(DataError, match="the 2 different answers of 3 ON samples all begin with the same token"):
        load([SEVERAL, GOOD, GOOD], "data.answer=first")
    assert len(load([GOOD, GOOD], "data.answer=first").on) == 2
    assert len(load([SEVERAL, GOOD], "data.answer=whole").on) == 2


def test_skipped_samples_are_counted_and_replaced() -> None:
    made = load([SEVERAL, GOOD, LONG, GOOD, BOUNDARY, SEVERAL, GOOD, GOOD], "eval.on_samples=3", "data.unusable=skip")
    assert [sample.sample_id for sample in made.on] == ["on-1", "on-3", "on-6"]
    assert [(each.kind, each.reason, each.count, each.examples) for each in made.unusable] == [
        ("ON", REASONS[SEVERAL], 2, ("on-0", "on-5")),
        ("ON", REASONS[LONG], 1, ("on-2",)),
        ("ON", REASONS[BOUNDARY], 1, ("on-4",)),
    ]
    assert made.notes == ()


@pytest.mark.parametrize("skip", ["refuse", "skip"])
def test_no_more_samples_are_made_than_needed(skip: str) -> None:
    """A generator may go on for ever."""
    asked = []

    def endless() -> Iterator[tuple[str, str, str]]:
        for i in itertools.count():
            asked.append(i)
            yield GOOD

    assert len(load(endless(), "eval.on_samples=4", f"data.unusable={skip}").on) == 4
    assert len(asked) == 4


def test_an_endless_source_without_a_usable_sample_comes_to_an_end() -> None:
    with pytest.raises(DataError, match=r"^1000 of 1000 ON samples cannot be used: 1000 x answer is several tokens") as caught:
        load(itertools.repeat(SEVERAL), "eval.on_samples=4", "data.unusable=skip")
    assert "data.unusable=skip" not in str(caught.value)


@pytest.mark.parametrize("skip", ["refuse", "skip"])
def test_no_samples_at_all(skip: str) -> None:
    with pytest.raises(DataError, match="there are no ON samples"):
        load([], f"data.unusable={skip}")
    with pytest.raises(DataError, match="there are no OFF prompts"):
        load([GOOD], "eval.on_samples=1", f"data.unusable={skip}", off=())


def test_a_shorter_source_gives_what_it_has_and_says_so() -> None:
    made = load([GOOD, SEVERAL, GOOD], "eval.on_samples=6", "data.unusable=skip")
    assert len(made.on) == 2
    assert len(made.notes) == 1
    assert "given" in made.notes[0]
    assert "fewer than eval.on_samples = 6" in made.notes[0]
    assert load([GOOD], "eval.on_samples=1").notes == ()


def test_off_prompts_are_treated_alike() -> None:
    off = (OffText("a", "Why?"), OffText("b", "word " * 200), OffText("c", ""), OffText("d", "What?"))
    with pytest.raises(DataError, match=r"^2 of 4 OFF prompts cannot be used: 1 x longer than .* \('b'\), 1 x prompt without"):
        load([GOOD], "eval.on_samples=1", off=off, chat=False)
    made = load([GOOD], "eval.on_samples=1", "data.unusable=skip", off=off, chat=False)
    assert [prompt.sample_id for prompt in made.off] == ["a", "d"]
    assert {(each.kind, each.examples) for each in made.unusable} == {("OFF", ("b",)), ("OFF", ("c",))}
    assert "fewer than eval.off_samples = 4" in made.notes[0]


def test_documents_stand_in_no_template() -> None:
    off = (OffText("a", "What is chess? A game. " * 40, document=True), OffText("b", "Why?"))
    document, prompt = load([GOOD], "eval.on_samples=1", "data.off_length=5", off=off).off
    assert len(document.token_ids) == 5
    assert "<user>" not in document.prompt_text
    assert "<user>" in prompt.prompt_text


def test_repeated_ids_are_rejected() -> None:
    with pytest.raises(DataError, match="two OFF samples have the id 'a'"):
        load([GOOD], "eval.on_samples=1", off=(OffText("a", "Why?"), OffText("a", "What?")))


def test_tokens_beyond_the_vocabulary_are_a_reason() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.add_tokens([AddedToken("zyx", special=False)])
    texts = SampleTexts(Given([(" zyx", QUERY, " red"), GOOD]), OFF)
    config = tiny.config("nowhere", "eval.on_samples=1", "data.unusable=skip", "eval.off_samples=3")
    made = load_samples(config, tokenizer, 1024, 500, texts)
    assert [each.reason for each in made.unusable] == ["token beyond the model's vocabulary"]
    assert [sample.sample_id for sample in made.on] == ["on-1"]


@pytest.mark.parametrize(("answer", "read"), [("first", 0), ("whole", 2)])
def test_a_whole_answer_needs_its_positions(answer: str, read: int) -> None:
    """All but its last token are read after the query."""
    config = tiny.config("nowhere", "eval.on_samples=1", "eval.off_samples=3", f"data.answer={answer}")
    texts = SampleTexts(Given([(" red" * 60, QUERY, " red blue green")]), OFF)
    needed = len(load_samples(config, tiny.tokenizer(), 1024, 500, texts).on[0].teacher_ids) + read
    assert len(load_samples(config, tiny.tokenizer(), needed, 500, texts).on) == 1
    with pytest.raises(DataError, match=rf"sample on-0 needs {needed} positions .*, the model has {needed - 1} "):
        load_samples(config, tiny.tokenizer(), needed - 1, 500, texts)


def test_chat_format_needs_shots() -> None:
    """Episodes that are text already cannot be written as turns."""
    with pytest.raises(DataError, match=r"sample on-0: data\.format = chat, but .* finished text"):
        load([GOOD], "eval.on_samples=1", "data.format=chat")
