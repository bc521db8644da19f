"""What every registered task promises, whatever its parameters, and that the check of it catches what breaks a promise."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cedkv.config.data import DataBlock
from cedkv.config.extensions import TASKS
from cedkv.core.errors import DataError
from cedkv.core.registry import build
from cedkv.core.values import OnEpisode
from cedkv.tasks import off_prompts
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.load import load_samples
from cedkv.tasks.symbol_lookup import SYMBOLS
from cedkv.tasks.words import read_words
from cedkv.testing import WordTokenizer, check_task
from tests.support import tiny

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TASKS.builtin),
    ("symbol_lookup", {"symbols": "words"}),
    ("symbol_lookup", {"repeats": True}),
    ("kv_retrieval", {"keys": "words"}),
    ("kv_retrieval", {"keys": "uuid", "values": "uuid"}),
    ("kv_retrieval", {"values": "digits", "digits": 7}),
    ("needle", {"depth": 0.5}),
    ("needle", {"values": "digits"}),
    ("label_mapping", {"categories": 8}),
    ("word_pairs", {"relation": "capitals"}),
    ("word_pairs", {"relation": "plurals"}),
    ("word_pairs", {"shown": True}),
]
every_task = pytest.mark.parametrize(("name", "params"), CASES, ids=[f"{name}-{params}" for name, params in CASES])


def made(name: str, params: dict[str, Any], off_words: frozenset[str] = frozenset(), **data: Any) -> list[OnEpisode]:
    """Ten episodes of a task."""
    task = build(TASKS.get(name), params, "data.params")
    request = TaskRequest(10, 42, DataBlock.model_validate(data), WordTokenizer(), off_words, {})
    return list(islice(task.episodes(request), 10))


@every_task
def test_contract(name: str, params: dict[str, Any]) -> None:
    check_task(name, **params)


@every_task
def test_shots_and_kinds_cover_the_demo(name: str, params: dict[str, Any]) -> None:
    for episode in made(name, params):
        assert len(episode.shots or ()) == 8
        for ranges in (episode.shots or (), [kind[:2] for kind in episode.char_kinds]):
            assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
            assert ranges[-1][1] == len(episode.demo_text)
        assert {kind for _, _, kind in episode.char_kinds} == {"input", "delimiter", "answer"}


@every_task
def test_demos_fill_so_many_tokens(name: str, params: dict[str, Any]) -> None:
    for length in (80, 300):
        lengths = [len(WordTokenizer()(episode.demo_text).input_ids) for episode in made(name, params, demo_tokens=length)]
        assert max(lengths) <= length, lengths
        assert min(lengths) > length - 40, lengths


@every_task
def test_a_template_of_the_users_own(name: str, params: dict[str, Any]) -> None:
    for episode in made(name, params, template="Q: {input}\nA: {output}\n\n"):
        assert re.fullmatch(r"Q: .+\nA:", episode.query_text)
        assert episode.answer_text[0] == " "
        assert f"{episode.other_query_text}"[:3] == "Q: "
        assert any(episode.demo_text[start:end].startswith("Q: ") for start, end in episode.shots or ())


@every_task
def test_words_of_off_prompts_are_avoided(name: str, params: dict[str, Any]) -> None:
    """What is asked and answered, not the words of a template or of filler."""

    def content(episode: OnEpisode) -> frozenset[str]:
        asked = [episode.demo_text[a:b] for a, b, kind in episode.char_kinds if kind == "answer"]
        if name != "needle":
            asked += [episode.demo_text[a:b] for a, b, kind in episode.char_kinds if kind == "input"]
        return frozenset(re.findall(r"[a-z]+", " ".join([*asked, episode.answer_text]).lower()))

    if "uuid" in params.values():
        return  # digits and letters that are no words
    usual = content(made(name, params, pairs=4)[0])
    for episode in made(name, params, usual, pairs=4):
        assert not content(episode) & usual
    for episode in made(name, params, off_prompts.words()):
        assert not content(episode) & off_prompts.words()


@every_task
def test_source_names_what_was_chosen(name: str, params: dict[str, Any]) -> None:
    task = build(TASKS.get(name), params, "data.params")
    for data, length in ((DataBlock(pairs=5), "pairs=5"), (DataBlock(demo_tokens=90), "demo_tokens=90")):
        source = task.source(TaskRequest(1, 7, data, WordTokenizer(), frozenset(), {}))
        assert source == f"{name}({', '.join([*(f'{k}={v}' for k, v in params.items()), length, 'seed=7'])})"


def test_no_room_for_two_shots() -> None:
    for name in TASKS.builtin:
        with pytest.raises(DataError, match=r"^data\.demo_tokens = 6 has no room for two shots, .*; raise it$"):
            made(name, {}, demo_tokens=6)


def test_ids_differ_between_tasks() -> None:
    ids = [made(name, {})[0].sample_id for name in TASKS.builtin]
    assert len(set(ids)) == len(TASKS.builtin)
    assert ids[0] == "on-42-00000"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which half of the words are one token, as in a large vocabulary most are."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    known = (*SYMBOLS, *read_words("words"), *read_words("antonyms"))[::2]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([f"Word: x\nSymbol: {word}\n\n" * 5 for word in known], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TASKS.builtin)
def test_answers_are_single_tokens_as_a_run_needs_them(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny.config("nowhere", f"data.task={name}", "eval.on_samples=30")
    samples = load_samples(config, tokenizer, 4096, 3000)
    assert [sample.sample_id[-5:] for sample in samples.on] == [f"{i:05d}" for i in range(30)]
    assert all(len(sample.answer_token_ids) == 1 for sample in samples.on)


def test_answers_of_several_tokens_are_taken_where_single_ones_are_too_few() -> None:
    """The tiny tokenizer splits every word of the list: nothing to choose from at ``single``, everything at ``whole``."""
    for task in ("kv_retrieval", "needle", "label_mapping"):
        made_of = build(TASKS.get(task), {}, "data.params")
        single, whole = (
            TaskRequest(1, 42, DataBlock(answer=answer), tiny.tokenizer(), frozenset(), {}) for answer in ("single", "whole")
        )
        with pytest.raises(DataError, match=r"but only 0 of the built-in symbols are one token .* \(none\); .*data\.on_path"):
            made_of.episodes(single)
        assert next(iter(made_of.episodes(whole))).answer_text.strip() in read_words("words")


@dataclass(frozen=True)
class Planted(Task):
    """Episodes of symbol_lookup, each changed by a function."""

    change: Callable[[OnEpisode], OnEpisode]

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        task = build(TASKS.get("symbol_lookup"), {"repeats": True}, "data.params")
        return (self.change(episode) for episode in task.episodes(request))

    def source(self, request: TaskRequest) -> str:
        return "planted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: replace(e, gold=None), "no gold, which the task says it gives"),
        (lambda e: replace(e, gold=(0, 5)), "gold does not hold the answer"),
        (lambda e: replace(e, gold=(0, 10**6)), "gold is outside the demo"),
        (lambda e: replace(e, other_query_text=e.query_text), "the other query is the same one"),
        (lambda e: replace(e, shots=e.shots[::-1]), "shots do not ascend"),
        (lambda e: replace(e, char_kinds=((0, 5, "input"), (4, 6, "answer"))), "char_kinds do not ascend"),
        (lambda e: replace(e, labels=(" teal", " cyan")), "the answer is not among the labels"),
        (lambda e: replace(e, sample_id="same"), "episodes share an id"),
    ],
)
def test_a_broken_promise_is_seen(
    change: Callable[[OnEpisode], OnEpisode], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cedkv.testing.build", lambda cls, params, key: Planted(change))
    with pytest.raises(AssertionError, match=message):
        check_task("symbol_lookup")
