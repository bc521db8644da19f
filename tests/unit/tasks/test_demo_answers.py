"""Where a demo shows answers: told from the episode alone, as a reader would, whatever is a mere word of the text."""

from __future__ import annotations

import pytest

from cedkv.tasks.demo_answers import find_answers, fold, guess_kinds

TWO = "Word: dax\nSymbol: red\n\nWord: lug\nSymbol: light blue\n\n"
ASKED = "Word: lug\nSymbol:"
LETTERS = "Q: A cat sat? (A) yes (B) no\nAnswer: A\n\nQ: A dog ran? (A) no (B) yes\nAnswer: B\n\n"


def shown(demo: str, query: str, *answers: str, unlisted: bool = True) -> list[str]:
    return [demo[start:end] for start, end in find_answers(demo, query, answers, unlisted)]


@pytest.mark.parametrize(
    ("demo", "query", "answer", "expected"),
    [
        (TWO, ASKED, " red", ["red", "light blue"]),
        (TWO, ASKED, " green", ["red", "light blue"]),
        (TWO, ASKED, " light", ["red", "light blue"]),
        (LETTERS, "Q: A cow?\nAnswer:", " A", ["A", "B"]),
        ("Q: Is gold red? A: red\nQ: Is red gold? A: gold\n", "Q: Is gold gold? A:", " gold", ["red", "gold"]),
        ("dax: red\nlug: light blue\nwug: red\n", "wug:", " red", ["red", "light blue", "red"]),
        ("blue whale: big\nred ant: small\n", "grey whale:", " big", ["big", "small"]),
        ("dax=red, lug=blue, ", "lug=", "blue", ["red", "blue"]),
        ("dax -> red, lug -> blue, ", "lug ->", " blue", ["red", "blue"]),
        ("dax = red lug = blue\n", "lug =", " red", ["red", "blue"]),
        ("Is dax? Answer: yes.\nIs lug? Answer: no.\n", "Is wug? Answer:", " no", ["yes", "no"]),
        ("<|user|>\nx\n<|bot|>\nred\n<|user|>\ny\n<|bot|>\nblue\n", "<|user|>\nz\n<|bot|>\n", "red", ["red", "blue"]),
        ("词：猫\n词：狗\n", "词：", "猫", ["猫", "狗"]),
    ],
)
def test_answers_stand_where_the_query_goes_on(demo: str, query: str, answer: str, expected: list[str]) -> None:
    assert shown(demo, query, answer) == expected


@pytest.mark.parametrize(
    ("demo", "query", "answer", "expected"),
    [
        ("The capital of France is Paris. Paris is big.", "The capital of France is", " Paris", ["Paris"]),
        ("The dax is red; red is warm, infrared is not.", "Colour? Answer:", " red", ["red", "red"]),
        ("A cat sat, A dog ran. It was (A).", "Which? Answer:", " A", ["A"]),
        ("Note: the very long text of an instruction that says how to answer.\nx", "Note:", " A", []),
        ("nothing here", ASKED, " red", []),
        (TWO, ASKED, " ", []),
    ],
)
def test_texts_without_shots_have_the_known_answer_alone(demo: str, query: str, answer: str, expected: list[str]) -> None:
    assert shown(demo, query, answer) == expected


@pytest.mark.parametrize(
    ("demo", "answer", "expected"),
    [
        ("Symbol: RED\nSymbol: Blue\n", " red", ["RED", "Blue"]),
        ("Symbol: Cafe\u0301\nSymbol: x\n", " CAF\u00c9", ["Cafe\u0301", "x"]),
        ("Symbol: \u1112\u1161\u11ab\nSymbol: x\n", " \ud55c", ["\u1112\u1161\u11ab", "x"]),
        ("Symbol: STRASSE\nSymbol: x\n", " straße", ["STRASSE", "x"]),
        ("Symbol: \uff11\uff12\nSymbol: x\n", " 12", ["\uff11\uff12", "x"]),
    ],
)
def test_case_and_unicode_form_make_no_other_answer(demo: str, answer: str, expected: list[str]) -> None:
    assert shown(demo, "Symbol:", answer) == expected
    assert shown(demo, "Symbol:", answer, unlisted=False) == expected[:1]


def test_labels_are_answers_too_and_the_unlisted_only_where_asked_for() -> None:
    assert shown(TWO, ASKED, " red", " blue", unlisted=False) == ["red"]
    assert shown(TWO, ASKED, " red", " light blue", unlisted=False) == ["red", "light blue"]


def test_kinds_cover_the_demo_and_are_as_found() -> None:
    for demo, query, answer in ((TWO, ASKED, " red"), (LETTERS, "Q: x\nAnswer:", " A"), ("Ünï: é\n", "Ünï:", " é")):
        kinds = guess_kinds(demo, query, (answer,), unlisted=True)
        assert "".join(demo[start:end] for start, end, _ in kinds) == demo
        found = [demo[start:end] for start, end, kind in kinds if kind == "answer"]
        assert found == shown(demo, query, answer)
        assert all(demo[start:end].strip() for start, end, kind in kinds if kind == "input")
    assert fold(" E\u0301\n") == "é"
