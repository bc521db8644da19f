"""Samples of the user's own: read as they are, and each bad line named with its number and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode
from cedkv.tasks.episode_rows import as_line, read_episodes, read_prompts
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.rows import read_rows
from tests.support import tiny

ON = {"demo_text": "Word: dax\nSymbol: red\n\n", "query_text": "Word: dax\nSymbol:", "answer_text": " red"}
OTHER = {**ON, "demo_text": "Word: lug\nSymbol: red\n\n"}
OFF = {"prompt_text": "What is chess?"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.jsonl"


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def read_on(path: str, n: int) -> list[OnEpisode]:
    return read_episodes(read_rows(path, "data.on_path", lambda _: n).rows)


def read_off(path: str, n: int) -> list[tuple[str, str]]:
    return read_prompts(read_rows(path, "data.off_path", lambda _: n).rows)


def pieces(path: Path, *lines: object) -> list[tuple[str, str]]:
    """Text and kind of each range of the first line's demo."""
    (first, *_) = read_on(write(path, *lines), len(lines))
    return [(first.demo_text[start:end], kind) for start, end, kind in first.char_kinds]


def load(on: str | None, off: str | None, *overrides: str) -> Samples:
    paths = [f"data.{name}_path='{value}'" for name, value in (("on", on), ("off", off)) if value]
    return load_samples(tiny.config("nowhere", *paths, *overrides), tiny.tokenizer(), 1024, 500)


def test_generated_samples_written_and_read_are_the_same(tmp_path: Path) -> None:
    made = load(None, None)
    on = [as_line(sample.episode) for sample in made.on]
    off = [{"id": sample_id, "prompt_text": prompt} for sample_id, prompt in _texts(made)]
    again = load(write(tmp_path / "on.jsonl", *on), write(tmp_path / "off.jsonl", *off))
    assert (again.on, again.off) == (made.on, made.off)
    assert (again.on_source, again.off_source) == (f"{tmp_path}/on.jsonl", f"{tmp_path}/off.jsonl")


def _texts(made: Samples) -> list[tuple[str, str]]:
    """OFF prompts as they were before the chat template."""
    return [(s.sample_id, s.prompt_text.removeprefix("<user>\n").removesuffix("<end>\n<bot>\n")) for s in made.off]


def test_ids_default_to_the_line(path: Path) -> None:
    assert [e.sample_id for e in read_on(write(path, ON, {**ON, "id": "mine"}, ON), 3)] == ["on-00001", "mine", "on-00003"]
    assert read_off(write(path, OFF, {**OFF, "id": "x"}), 2) == [("off-00001", "What is chess?"), ("x", "What is chess?")]


def test_only_the_lines_asked_for_are_read(path: Path) -> None:
    """Whatever stands behind them, even if it is wrong."""
    assert len(read_on(write(path, ON, ON, "not JSON"), 2)) == 2


def test_text_is_kept_to_the_letter(path: Path) -> None:
    path.write_text('{"prompt_text": "Stra\\u00dfe \\ud834\\udd1e \\u2028 é\\n"}\n', encoding="utf-8")
    assert read_off(str(path), 1)[0][1] == "Straße 𝄞 \u2028 é\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "empty line"),
        ("   ", "empty line"),
        ("{", "not a JSON object"),
        ("NaN", "not a JSON object: NaN is not JSON"),
        ('{"demo_text": NaN}', "NaN is not JSON"),
        ('{"demo_text": -Infinity}', "-Infinity is not JSON"),
        ("[" * 100_000, "not a JSON object"),
        ("3", "a row should be an object, found 3"),
        ({**ON, "demo_text": None}, "demo_text: input should be a valid string, found None"),
        ({**ON, "query_text": ""}, "query_text: string should have at least 1 character, found ''"),
        ({**ON, "answer_text": 3}, "answer_text: input should be a valid string, found 3"),
        ({"demo_text": "a", "query_text": "b"}, "answer_text is missing"),
        ({**ON, "anwser": " red"}, "unknown key 'anwser'; known: answer_text"),
        ({**ON, "id": ""}, "id: string should have at least 1 character, found ''"),
        ({**ON, "id": 7}, "id: input should be a valid string, found 7"),
        ('{"demo_text": "\\ud800", "query_text": "b", "answer_text": "c"}', "invalid JSON: unexpected end of hex escape"),
        ('{"demo_text": "a", "demo_text": "b"}', "key 'demo_text' appears twice"),
        ({**ON, "id": "a\nb"}, "id: text must hold no control or direction characters"),
        ({**ON, "id": "\u202egnp.exe"}, "id: text must hold no control or direction characters"),
        ({**ON, "demo_kinds": [[0, 5, "delimiter"], [4, 9, "input"]]}, "range [4, 9): ranges must ascend without overlap"),
        ({**ON, "demo_kinds": [[5, 9, "input"], [0, 5, "delimiter"]]}, "demo_kinds range [0, 5)"),
        ({**ON, "demo_kinds": [[5, 5, "input"]]}, "demo_kinds range [5, 5)"),
        ({**ON, "demo_kinds": [[-1, 5, "input"]]}, "demo_kinds range [-1, 5)"),
        ({**ON, "demo_kinds": [[0, 24, "input"]]}, "inside demo_text (0..23)"),
        ({**ON, "demo_kinds": [[0, 5, "bos"]]}, "demo_kinds.0.2: input should be 'input', 'delimiter' or 'answer'"),
        ({**ON, "gold": [9, 24]}, "gold range [9, 24): ranges must ascend without overlap inside demo_text (0..23)"),
        ({**ON, "gold": [5, 5]}, "gold range [5, 5)"),
        ({**ON, "shots": []}, "shots: list should have at least 1 item after validation, not 0, found []"),
        ({**ON, "shots": [[0, 5], [4, 9]]}, "shots range [4, 9): ranges must ascend without overlap inside demo_text (0..23)"),
        ({**ON, "shots": [[5, 9], [0, 5]]}, "shots range [0, 5)"),
        ({**ON, "shots": [[5, 5]]}, "shots range [5, 5)"),
        ({**ON, "shots": [[-1, 5]]}, "shots range [-1, 5)"),
        ({**ON, "shots": [[0, 24]]}, "shots range [0, 24)"),
        ({**ON, "shots": [[0]]}, "shots.0.1 is missing"),
        ({**ON, "other_query_text": ""}, "other_query_text: string should have at least 1 character"),
        ({**ON, "demo_kinds": [[0, 5]]}, "demo_kinds.0.2 is missing"),
        ({**ON, "labels": []}, "labels: list should have at least 1 item"),
        ({**ON, "labels": [""]}, "labels.0: string should have at least 1 character"),
        ({**ON, "markup": [[0, 42]]}, "markup range [0, 42): ranges must ascend without overlap inside demo_text + query_text"),
    ],
)  # fmt: skip
def test_bad_line_is_named(path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_on(write(path, ON, line, ON), 3)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("line", "message"), [("", "empty line"), ({"prompt": "x"}, "prompt_text is missing")])
def test_bad_off_line_is_named(path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf":2: .*{message}"):
        read_off(write(path, OFF, line, OFF), 3)


def test_empty_lines_at_the_end_are_none(path: Path) -> None:
    assert len(read_off(write(path, OFF, "", "  "), 9)) == 1


def test_repeated_id_names_both_lines(path: Path) -> None:
    named = {**OFF, "id": "a"}
    with pytest.raises(DataError, match=r":3: id 'a' was already used at .*own\.jsonl:1"):
        read_off(write(path, named, OFF, named), 3)


def test_id_that_meets_a_made_one(path: Path) -> None:
    off = write(path, OFF, {**OFF, "id": "off-00001"})
    with pytest.raises(DataError, match="two OFF samples have the id"):
        load(None, off, "eval.off_samples=2")


def test_a_shorter_file_gives_what_it_has(path: Path, tmp_path: Path) -> None:
    on, off = write(path, {**ON, "id": "a"}, OTHER), write(tmp_path / "off.jsonl", OFF)
    made = load(on, off, "eval.on_samples=3", "eval.off_samples=2")
    assert [sample.sample_id for sample in made.on] == ["a", "on-00002"]
    assert made.notes == (
        f"{on} has 2 samples, fewer than eval.on_samples = 3: all of them are taken",
        f"{off} has 1 sample, fewer than eval.off_samples = 2: all of them are taken",
    )
    assert load(on, off, "eval.on_samples=2", "eval.off_samples=1").notes == ()


def test_an_empty_file_is_an_error(path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl: no rows, where data\.on_path needs one or more"):
        load(write(path), None)


def test_unreadable_file_names_the_key(path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.on_path = .*own\.jsonl' cannot be read"):
        read_on(str(path), 1)
    path.write_bytes(b'{"prompt_text": "\xff"}\n')
    with pytest.raises(DataError, match=r"^data\.off_path = .* cannot be read"):
        read_off(str(path), 1)


def test_bad_sample_is_named_by_id(path: Path) -> None:
    on = write(path, {**ON, "id": "mine", "answer_text": " red blue"})
    with pytest.raises(
        DataError, match=r"^1 of 1 ON samples cannot be used: .* sample mine: answer_text ' red blue' is 2 tokens"
    ):
        load(on, None, "eval.on_samples=1")


def test_given_kinds_are_kept(path: Path) -> None:
    ranges = [[0, 5, "delimiter"], [5, 9, "input"], [17, 21, "answer"]]
    assert pieces(path, {**ON, "demo_kinds": ranges}) == [("Word:", "delimiter"), (" dax", "input"), (" red", "answer")]
    assert pieces(path, {**ON, "demo_kinds": []}) == []


def test_kinds_are_guessed(path: Path) -> None:
    """A line's own answer and labels, as words of their own; what the other lines of the file ask says nothing."""
    demo = "dax: red, infrared redder: light blue\n"
    own = {**ON, "demo_text": demo, "labels": [" red", " light blue"]}
    lines = [own, {**ON, "answer_text": " redder"}, {**ON, "answer_text": " light"}]
    assert pieces(path, *lines) == [
        ("dax", "input"), (": ", "delimiter"), ("red", "answer"), (", ", "delimiter"), ("infrared", "input"),
        (" ", "delimiter"), ("redder", "input"), (": ", "delimiter"), ("light blue", "answer"), ("\n", "delimiter"),
    ]  # fmt: skip


def test_kinds_do_not_depend_on_how_many_lines_are_read(path: Path) -> None:
    lines = [
        {**ON, "demo_text": "Word: dax\nSymbol: red\n\nWord: lug\nSymbol: blue\n\n", "answer_text": a}
        for a in (" red", " blue")
    ]
    alone, both = (read_on(write(path, *lines), n)[0] for n in (1, 2))
    assert alone == both
    assert [alone.demo_text[start:end] for start, end, kind in alone.char_kinds if kind == "answer"] == ["red", "blue"]


@pytest.mark.parametrize("answer", ["+", "a.c", "(", "ß"])
def test_guessing_takes_answers_to_the_letter(path: Path, answer: str) -> None:
    """An answer is a text, not a pattern."""
    found = pieces(path, {**ON, "demo_text": f"abc {answer} abc", "answer_text": f" {answer}"})
    assert [text for text, kind in found if kind == "answer"] == [answer]


def test_blank_answer_makes_nothing_an_answer(path: Path) -> None:
    found = pieces(path, {**ON, "answer_text": " "})
    assert {kind for _, kind in found} == {"input", "delimiter"}


# shots

TWO = {**ON, "demo_text": "Words.\nx: red\n\ny: light red \n\nz: dax"}


def shots(path: Path, *lines: object) -> list[str] | None:
    """The shots of the first line, as text."""
    (first, *_) = read_on(write(path, *lines), len(lines))
    return None if first.shots is None else [first.demo_text[start:end] for start, end in first.shots]


def test_given_shots_are_kept(path: Path) -> None:
    """Whatever the answers are, gaps included, up to the demo's last character."""
    assert shots(path, {**TWO, "shots": [[7, 13], [15, 36]]}) == ["x: red", "y: light red \n\nz: dax"]


def test_shots_are_guessed_from_answers(path: Path) -> None:
    """A shot ends with an answer and the whitespace after it, the next one starts there; what follows the last is in none."""
    assert shots(path, TWO) == ["Words.\nx: red\n\n", "y: light red \n\n"]
    assert shots(path, {**TWO, "demo_text": "x: red"}) == ["x: red"]
    labelled = {**TWO, "labels": [" dax", " red"]}
    assert shots(path, labelled) == ["Words.\nx: red\n\n", "y: light red \n\n", "z: dax"]


def test_given_kinds_say_where_guessed_shots_end(path: Path) -> None:
    assert shots(path, {**TWO, "demo_kinds": [[7, 8, "input"], [24, 27, "answer"]]}) == ["Words.\nx: red\n\ny: light red \n\n"]


def test_without_answers_there_are_no_shots(path: Path) -> None:
    assert shots(path, {**TWO, "demo_kinds": []}) is None
    assert shots(path, {**TWO, "answer_text": " blue"}) is None


def test_shots_are_the_tokens_that_touch_them(path: Path) -> None:
    """A shot of the sample is a range of demo tokens, whose text holds it."""
    (sample,) = load(write(path, {**ON, "shots": [[0, 9], [11, 23]]}), None, "eval.on_samples=1").on
    tokenizer = tiny.tokenizer()
    assert sample.shot_tokens is not None
    texts = [tokenizer.decode(sample.demo_token_ids[start:end]) for start, end in sample.shot_tokens]
    assert all(shot in text for shot, text in zip(("Word: dax", "Symbol: red\n\n"), texts, strict=True))
    (first, second) = sample.shot_tokens
    assert 0 == first[0] < first[1] <= second[0] < second[1] == len(sample.demo_token_ids)
