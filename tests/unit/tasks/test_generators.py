"""What each generator is about, beyond what every task promises."""

import re
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from cedkv.config.data import DataBlock
from cedkv.config.extensions import TASKS
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.registry import build
from cedkv.core.values import OnEpisode
from cedkv.tasks import off_prompts
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.words import read_rows, read_words, spelt_words
from cedkv.testing import WordTokenizer


def task(name: str, **params: Any) -> Task:
    made: Task = build(TASKS.get(name), params, "data.params")
    return made


def made(
    name: str, params: dict[str, Any], n: int = 40, off_words: frozenset[str] = frozenset(), **data: Any
) -> list[OnEpisode]:
    request = TaskRequest(n, 42, DataBlock.model_validate(data), WordTokenizer(), off_words, {})
    return list(islice(task(name, **params).episodes(request), n))


def shots(episode: OnEpisode) -> list[str]:
    return [episode.demo_text[start:end] for start, end in episode.shots or ()]


def gold(episode: OnEpisode) -> str:
    assert episode.gold is not None
    return episode.demo_text[slice(*episode.gold)]


@pytest.mark.parametrize("name", ["antonyms", "capitals", "plurals"])
def test_lists_of_pairs_repeat_nothing(name: str) -> None:
    """A word in two pairs would give a question two answers, or show the answer in another shot."""
    rows = read_rows(name)
    assert len(rows) >= 100
    assert all(len(row) == 2 and all(word == word.strip() != "" for word in row) for row in rows)
    assert [word for word, n in Counter(word for row in rows for word in row).items() if n > 1] == []


def test_lists_of_words_repeat_nothing() -> None:
    categories = {name: words for name, *words in read_rows("categories")}
    texts = [word for words in categories.values() for word in words]
    listed = [*texts, *read_words("words"), *read_words("qualifiers")]
    assert [word for word, n in Counter(listed).items() if n > 1] == []
    assert len(read_words("words")) >= 250
    assert len(categories) == 8
    assert all(len(set(words) - off_prompts.words()) >= 20 for words in categories.values())
    assert not spelt_words(" ".join(read_words("filler"))) & (
        off_prompts.words() - {"a", "and", "at", "in", "of", "on", "s", "the", "to"}
    )


def test_a_value_is_that_of_its_key() -> None:
    for episode in made("kv_retrieval", {}, pairs=200):
        known = dict(shot.rstrip("\n").split(": ") for shot in shots(episode))
        assert len(known) == 200
        assert all(re.fullmatch(r"[1-9]\d{3}", key) for key in known)
        assert episode.answer_text == f" {known[episode.query_text.removesuffix(':')]}"
        assert gold(episode) == f"{episode.query_text}{episode.answer_text}\n"


def test_numbers_and_uuids_begin_with_a_digit_after_an_equals_sign() -> None:
    """After a space, an answer's first token would be that space with many tokenizers: right whatever was answered."""
    for values, form in (
        ("digits", r"[1-9]\d{5}"),
        ("uuid", r"[1-9][0-9a-f]{7}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"),
    ):
        for episode in made("kv_retrieval", {"values": values, "digits": 6}, 10):
            assert re.fullmatch(form, episode.answer_text)
            assert episode.query_text.endswith("=")
            assert episode.labels is None


def test_more_keys_than_numbers() -> None:
    with pytest.raises(
        DataError, match=r"data\.pairs = 91, but there are 90 numbers of data\.params\.digits = 2; raise digits"
    ):
        made("kv_retrieval", {"digits": 2}, pairs=91)
    (episode,) = made("kv_retrieval", {"digits": 2}, 1, pairs=90)
    assert len({shot.split(":")[0] for shot in shots(episode)}) == 90
    (episode,) = made("kv_retrieval", {"digits": 1}, 1, demo_tokens=4000)
    assert len(shots(episode)) == 9


@pytest.mark.parametrize(("depth", "at"), [(0, 0), (0.25, 5), (0.5, 10), (1, 20)])
def test_a_needle_lies_at_its_depth(depth: float, at: int) -> None:
    for episode in made("needle", {"depth": depth}, 10, pairs=21):
        assert shots(episode)[at] == gold(episode) == f"{episode.query_text}{episode.answer_text}.\n"


def test_a_needle_lies_anywhere_unless_told() -> None:
    at = [shots(episode).index(gold(episode)) for episode in made("needle", {}, 100, pairs=4)]
    assert {at.count(k) > 10 for k in range(4)} == {True}
    others = [
        i for e in made("needle", {}, 100, pairs=4) for i, s in enumerate(shots(e)) if s.startswith(f"{e.other_query_text} ")
    ]
    assert len(others) == 100
    assert {others.count(k) > 10 for k in range(4)} == {True}


def test_filler_says_nothing_about_facts() -> None:
    for episode in made("needle", {}, pairs=30):
        facts = [shot for shot in shots(episode) if shot.startswith("The secret code of ")]
        assert len(facts) == 2
        filler = [shot for shot in shots(episode) if shot not in facts]
        assert not spelt_words(" ".join(filler)) & {*spelt_words(" ".join(episode.labels or ())), "secret", "code"}
        assert len(set(filler)) == 28
        kinds = {episode.demo_text[a:b].strip(): kind for a, b, kind in episode.char_kinds}
        assert (kinds["."], kinds[","], kinds[episode.answer_text.strip()]) == ("delimiter", "delimiter", "answer")
        assert kinds[filler[0].split()[0]] == "input"


def test_labels_mean_categories() -> None:
    """The text that is asked for is in no shot, its category is in several, and all of these have the answer's label."""
    category = {word: name for name, *words in read_rows("categories") for word in words}
    for episode in made("label_mapping", {}, pairs=12):
        found = re.findall(r"Text: (.+)\nLabel: (\w+)\n\n", episode.demo_text)
        meaning = {label: {category[text] for text, other in found if other == label} for _, label in found}
        assert all(len(names) == 1 for names in meaning.values())
        assert len(meaning) == len({name for names in meaning.values() for name in names}) == 4
        assert Counter(label for _, label in found) == dict.fromkeys(meaning, 3)
        asked = re.fullmatch(r"Text: (\w+)\nLabel:", episode.query_text)
        assert asked is not None
        assert asked[1] not in [text for text, _ in found]
        assert meaning[episode.answer_text.strip()] == {category[asked[1]]}
        last = [shot for shot in shots(episode) if shot.endswith(f"{episode.answer_text}\n\n")][-1]
        assert gold(episode) == last
        assert {label.strip() for label in episode.labels or ()} == set(meaning)


def test_long_demos_of_labels_qualify_their_texts() -> None:
    for episode in made("label_mapping", {"categories": 2}, 5, pairs=900):
        texts = re.findall(r"Text: (.+)\n", episode.demo_text)
        asked = episode.query_text.split()[1]
        assert len(texts) == len(set(texts)) == 900
        assert not [text for text in texts if asked in text.split()]
    with pytest.raises(DataError, match=r"^data\.pairs = 2000, but 2 categories have 1,104 texts; lower it, or raise"):
        made("label_mapping", {"categories": 2}, pairs=2000)


def test_off_prompts_that_take_most_words() -> None:
    taken = frozenset(word for _, *words in read_rows("categories")[:6] for word in words)
    with pytest.raises(DataError, match=r"categories = 4, but only 2 categories have two words that occur in no OFF prompt"):
        made("label_mapping", {}, off_words=taken)
    cities = spelt_words(" ".join(city for _, city in read_rows("capitals")[1:]))
    with pytest.raises(DataError, match="nearly all cities occur in OFF prompts"):
        made("needle", {}, off_words=cities)
    words = spelt_words(" ".join(read_words("antonyms")[6:]))
    with pytest.raises(DataError, match=r"^data\.pairs = 8, but the antonyms have 1 pairs for a demo"):
        made("word_pairs", {}, off_words=words)


@pytest.mark.parametrize("relation", ["antonyms", "capitals", "plurals"])
def test_pairs_are_those_of_the_list(relation: str) -> None:
    known = dict(read_rows(relation))
    for shown in (False, True):
        for episode in made("word_pairs", {"relation": relation, "shown": shown}):
            found = dict(shot.rstrip("\n").split(" -> ") for shot in shots(episode))
            assert found.items() <= known.items()
            asked, other = (f"{text}".removesuffix(" ->") for text in (episode.query_text, episode.other_query_text))
            assert episode.answer_text == f" {known[asked]}"
            assert (asked in found) == (other in found) == shown
            assert (episode.gold is not None) == shown == ("gold" in task("word_pairs", shown=shown).gives)
            assert not shown or gold(episode) == f"{episode.query_text}{episode.answer_text}\n"


def test_only_answers_of_one_token_are_asked_for_where_they_must_be() -> None:
    """The stand-in has a token per word: no two-word capital is asked for, though shots have them."""
    episodes = made("word_pairs", {"relation": "capitals"}, 300)
    assert not [e.answer_text for e in episodes if " " in e.answer_text.strip()]
    assert any("New Delhi" in e.demo_text for e in episodes)
    whole = made("word_pairs", {"relation": "capitals"}, 300, answer="whole")
    assert [e.answer_text for e in whole if " " in e.answer_text.strip()]


def test_more_pairs_than_the_list_has() -> None:
    most = len(read_rows("antonyms"))
    assert len(shots(made("word_pairs", {}, 1, pairs=most - 2)[0])) == most - 2
    assert len(shots(made("word_pairs", {"shown": True}, 1, pairs=most)[0])) == most
    with pytest.raises(DataError, match=rf"^data\.pairs = {most - 1}, but the antonyms have {most - 2} pairs for a demo"):
        made("word_pairs", {}, pairs=most - 1)
    assert len(shots(made("word_pairs", {}, 1, demo_tokens=10_000)[0])) == most - 2


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("needle", {"depth": 1.5}, r"data\.params\.depth: input should be less than or equal to 1, not 1\.5"),
        ("kv_retrieval", {"values": "letters"}, r"data\.params\.values: input should be 'words', 'digits' or 'uuid'"),
        ("kv_retrieval", {"digits": 0}, r"data\.params\.digits: input should be greater than or equal to 1, not 0"),
        ("label_mapping", {"categories": 9}, r"data\.params\.categories: input should be less than or equal to 8, not 9"),
        ("word_pairs", {"relations": "capitals"}, r"has no parameter 'relations'; did you mean 'relation'\?"),
        ("symbol_lookup", {"symbols": "numbers"}, r"data\.params\.symbols: input should be 'colours' or 'words'"),
    ],
)
def test_parameters_are_checked(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(name, **params)
