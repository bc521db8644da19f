"""Built-in samples: reproducible, answerable from the demo alone, and with nothing in common between ON and OFF."""

import hashlib
import re
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.config.data import DataBlock
from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode
from cedkv.tasks import off_prompts, words
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.symbol_lookup import SYMBOLS, SymbolLookup
from cedkv.testing import WordTokenizer
from tests.support import tiny

NOTHING: frozenset[str] = frozenset()


def episodes(n: int, seed: int, pairs: int, forbidden: frozenset[str] = NOTHING, **params: Any) -> list[OnEpisode]:
    request = TaskRequest(n, seed, DataBlock(pairs=pairs), WordTokenizer(), forbidden, {})
    return list(islice(SymbolLookup(**params).episodes(request), n))


def pairs(made: OnEpisode) -> dict[str, str]:
    found = re.findall(r"Word: (\w+)\nSymbol: (\w+)\n\n", made.demo_text)
    assert made.demo_text == "".join(f"Word: {word}\nSymbol: {symbol}\n\n" for word, symbol in found)
    assert len(dict(found)) == len(found)
    return dict(found)


def load(*overrides: str, bos: bool = False, chat: bool = True, max_positions: int = 1024) -> Samples:
    return load_samples(tiny.config("nowhere", *overrides), tiny.tokenizer(bos, chat), max_positions, 500)


@pytest.mark.parametrize(
    ("n", "seed", "pairs", "forbidden", "digest"),
    [
        (40, 42, 8, off_prompts.words(), "a4a87d907af17544b61a4434be0882413b33d01451243b36f42b17ee650e7b7a"),
        (40, 7, 12, off_prompts.words(), "4bb4e64f8596ec76cd14a1fb2261945a426907528905839501d6e2e5e703fde2"),
    ],
)
def test_samples_are_those_of_earlier_versions(n: int, seed: int, pairs: int, forbidden: frozenset[str], digest: str) -> None:
    """A run must be comparable with one of a year ago: a word, a kind or a range that changes shows here."""
    found = hashlib.sha256()
    for e in episodes(n, seed, pairs, forbidden):
        texts = (e.sample_id, e.demo_text, e.query_text, e.answer_text)
        found.update(repr((*texts, e.char_kinds, e.gold, e.other_query_text, e.shots)).encode())
    assert found.hexdigest() == digest


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63 - 1), n=st.integers(2, 12))
def test_answer_is_what_the_demo_says(seed: int, n: int) -> None:
    (made,) = episodes(1, seed, n)
    known = pairs(made)
    asked = re.fullmatch(r"Word: (\w+)\nSymbol:", made.query_text)
    assert asked is not None
    assert made.answer_text == f" {known[asked[1]]}"
    assert len(known) == len(set(known.values())) == n
    assert set(known.values()) <= set(SYMBOLS)
    assert not set(known) & set(SYMBOLS)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12))
def test_kinds_cover_the_demo(seed: int, n: int) -> None:
    (made,) = episodes(1, seed, n)
    assert [start for start, _, _ in made.char_kinds] == [0, *(end for _, end, _ in made.char_kinds[:-1])]
    assert made.char_kinds[-1][1] == len(made.demo_text)
    texts = {kind: [made.demo_text[a:b].strip() for a, b, k in made.char_kinds if k == kind] for kind in ("input", "answer")}
    assert dict(zip(texts["input"], texts["answer"], strict=True)) == pairs(made)


def test_episode_is_the_same_whatever_the_number_of_others() -> None:
    """``on-42-00002`` of a run with 3 samples and of one with 64 must be one and the same, or runs cannot be compared."""
    few, many = (episodes(n, 42, 6) for n in (3, 20))
    assert few == many[:3]
    assert len({made.sample_id for made in many}) == 20
    assert len({made.demo_text for made in many}) == 20
    assert not {made.demo_text for made in many} & {made.demo_text for made in episodes(20, 43, 6)}


def test_every_pair_is_asked_for() -> None:
    """A query that is always the last pair could be answered by copying the end of the demo."""
    asked = [list(pairs(made).values()).index(made.answer_text.strip()) for made in episodes(80, 42, 4)]
    assert {asked.count(k) > 8 for k in range(4)} == {True}


def test_words_of_a_demo_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs with one word would give one question two answers; of the usual 576,240 words a test would not see it."""
    for name in ("_ONSETS", "_CODAS"):
        monkeypatch.setattr(words, name, ("b",))
    monkeypatch.setattr(words, "_VOWELS", ("a", "e"))
    for made in episodes(5, 42, 4):
        assert sorted(pairs(made)) == ["babab", "babeb", "bebab", "bebeb"]


def test_gold_and_the_other_query() -> None:
    """``gold`` is the pair that was asked for, and the other query asks for another one."""
    for made in episodes(40, 42, 3):
        assert made.gold is not None
        assert made.demo_text[slice(*made.gold)] == f"{made.query_text}{made.answer_text}\n\n"
        assert made.other_query_text != made.query_text
        assert f"{made.other_query_text} " in made.demo_text


def test_symbols_that_stand_for_several_words() -> None:
    """With ``repeats``, every symbol is as frequent as any other, and the pair that was asked for is still gold."""
    for made in episodes(10, 42, 50, repeats=True):
        known = pairs(made)
        counts = [list(known.values()).count(symbol) for symbol in SYMBOLS]
        assert (sum(counts), set(counts)) == (50, {4, 5})
        assert made.gold is not None
        assert made.demo_text[slice(*made.gold)] == f"{made.query_text}{made.answer_text}\n\n"
        assert sorted(made.labels or ()) == sorted(f" {symbol}" for symbol in SYMBOLS)


def test_more_symbols() -> None:
    for made in episodes(5, 42, 200, symbols="words"):
        assert len(set(pairs(made).values())) == 200
    with pytest.raises(
        DataError, match=r"^data\.pairs = 13, but only 12 of the built-in symbols .*symbols: words.*repeats: true"
    ):
        episodes(1, 42, 13)


def test_forbidden_words_are_avoided() -> None:
    usual = set(pairs(*episodes(1, 42, 8)))
    other = set(pairs(*episodes(1, 42, 8, frozenset(usual))))
    assert not usual & other


def test_off_prompts_are_many_distinct_and_free_of_symbols() -> None:
    found = off_prompts.prompts(len(off_prompts.CATALOGUE), 42)
    assert len(found) == len({text for _, text in found}) == len({name for name, _ in found}) >= 200
    spelt = {word for _, text in found for word in re.findall(r"[a-z]+", text.lower())}
    assert not spelt & set(SYMBOLS)
    assert spelt <= off_prompts.words()


def test_off_prompts_are_drawn_from_the_seed() -> None:
    assert off_prompts.prompts(20, 42) == off_prompts.prompts(50, 42)[:20]
    assert off_prompts.prompts(20, 42) != off_prompts.prompts(20, 43)
    assert set(off_prompts.prompts(20, 43)) <= set(off_prompts.prompts(len(off_prompts.CATALOGUE), 42))


def test_more_off_prompts_than_there_are() -> None:
    n = len(off_prompts.CATALOGUE)
    with pytest.raises(DataError, match=rf"^{n + 1} OFF prompts asked for, {n} are built in: lower eval.off_samples"):
        load(f"eval.off_samples={n + 1}")
    assert len(load(f"eval.off_samples={n}", "eval.on_samples=1").off) == n


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_on_and_off_share_no_word_and_no_symbol(bos: bool, chat: bool) -> None:
    """A shared word would make an OFF prompt related to the demonstration, and its change deserved."""
    samples = load("eval.on_samples=20", "eval.off_samples=40", bos=bos, chat=chat)
    on = {word for s in samples.on for pair in pairs(s.episode).items() for word in pair}
    off = {word for s in samples.off for word in re.findall(r"[a-z]+", s.prompt_text.lower())}
    assert (len(samples.on), len(samples.off)) == (20, 40)
    assert not on & off
    assert all(s.has_bos == bos for s in (*samples.on, *samples.off))


def test_prompts_of_the_users_own_take_symbols_out(tmp_path: object) -> None:
    path = f"{tmp_path}/off.jsonl"
    with open(path, "w") as file:
        file.write('{"prompt_text": "Why is the sky blue, the sun YELLOW, and a rose Red?"}\n')
    samples = load(f"data.off_path={path}", "eval.off_samples=1", "eval.on_samples=20", "data.pairs=9")
    assert not {"blue", "yellow", "red"} & {symbol for s in samples.on for symbol in pairs(s.episode).values()}
    with pytest.raises(DataError, match=r"data\.pairs = 10, but only 9 of the built-in symbols"):
        load(f"data.off_path={path}", "eval.off_samples=1", "data.pairs=10")


def test_load_is_reproducible_and_says_where_from() -> None:
    one = load()
    assert one == load()
    assert one.on != load("seed=43").on
    assert one.on == load("eval.on_samples=9").on[:6]
    assert (one.on_source, one.off_source) == ("symbol_lookup(pairs=4, seed=42)", "off_prompts(seed=42)")


def test_sample_beyond_the_models_reach_is_named() -> None:
    """Beyond its positions a model still gives logits, and they mean nothing."""
    samples = load()
    longest = max(len(s.teacher_ids) for s in samples.on)
    prompt = max(len(s.token_ids) + 8 for s in samples.off)  # and base's answer; slots of a prefix take no position
    assert prompt < longest
    assert load(f"prefix_len={longest}", max_positions=longest) == samples
    with pytest.raises(
        DataError,
        match=rf"^\d of 6 ON samples .* sample on-42-0000\d needs {longest} positions .*, the model has {longest - 1} ",
    ):
        load(max_positions=longest - 1)
    with pytest.raises(
        DataError, match=rf"^\d of 8 OFF prompts .* sample off-\d+ needs {prompt} positions .*, the model has {prompt - 1} "
    ):
        load(max_positions=prompt - 1)
