"""n counts different samples: what repeats another one is rejected with its place, or left out and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from tokenizers import normalizers

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.generated import Draw, GeneratedTask
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.shots import Question, Shot, ShotTemplate
from cedkv.tasks.texts import OffText, PickedEpisodes, SampleTexts
from tests.support import tiny

ON = {"demo_text": "Word: dax\nSymbol: red\n\n", "query_text": "Word: dax\nSymbol:", "answer_text": " red"}
OFF = tuple(OffText(f"off-{i}", f"What is {i}?") for i in range(3))


@dataclass(frozen=True)
class Keys(Task):
    """One episode for each key."""

    keys: tuple[str, ...]

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        for i, key in enumerate(self.keys):
            yield OnEpisode(f"on-{i}", f"Word: {key}\nSymbol: red\n\n", f"Word: {key}\nSymbol:", " red", ())

    def source(self, request: TaskRequest) -> str:
        return "keys"


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def load(on: str | None, off: str | None, *overrides: str) -> Samples:
    paths = [f"data.{name}_path='{value}'" for name, value in (("on", on), ("off", off)) if value]
    return load_samples(tiny.config("nowhere", *paths, *overrides), tiny.tokenizer(), 1024, 500)


def test_identical_lines_are_one_sample(tmp_path: Path) -> None:
    """Whatever their ids are, and whether they agree in the answer."""
    other = {**ON, "demo_text": "Word: dax\nSymbol: red\n\nWord: lug\nSymbol: blue\n\n"}
    path = write(tmp_path / "on.jsonl", {**ON, "id": "a"}, other, {**ON, "id": "b"}, {**ON, "answer_text": " blue"})
    with pytest.raises(DataError) as caught:
        load(path, None, "eval.on_samples=4")
    said = str(caught.value)
    assert said.startswith("2 of 4 ON samples cannot be used: 2 x repeats another sample ('b', 'on-00004').")
    assert " Repeats another sample: line 3 as line 1, line 4 as line 1." in said
    assert f"sample b ({path}:3) has the same demo and query as sample a ({path}:1): n counts different samples" in said
    assert len(load(path, None, "eval.on_samples=2").on) == 2, "what stands behind the samples of the run is none of it"
    left_out = load(path, None, "eval.on_samples=4", "data.unusable=skip")
    assert [sample.sample_id for sample in left_out.on] == ["a", "on-00002"]
    assert [(each.kind, each.reason, each.count) for each in left_out.unusable] == [("ON", "repeats another sample", 2)]


def test_the_same_query_about_another_demo_is_another_sample(tmp_path: Path) -> None:
    lines = [{**ON, "demo_text": f"Word: dax\nSymbol: {colour}\n\n", "answer_text": f" {colour}"} for colour in ("red", "blue")]
    assert len(load(write(tmp_path / "on.jsonl", *lines), None, "eval.on_samples=2").on) == 2


def test_repeated_prompts_are_one(tmp_path: Path) -> None:
    path = write(tmp_path / "off.jsonl", {"prompt_text": "Why?"}, {"prompt_text": "How?"}, {"prompt_text": "Why?", "id": "x"})
    with pytest.raises(
        DataError, match=r"^1 of 3 OFF prompts .* sample x \(.*:3\) has the same prompt as sample off-00001 \(.*:1\)"
    ):
        load(None, path, "eval.off_samples=3")
    assert len(load(None, path, "eval.off_samples=3", "data.unusable=skip").off) == 2
    (tmp_path / "off.txt").write_text("The same beginning, one end.\n\nThe same beginning, another end.\n\nAnother text.\n")
    with pytest.raises(DataError, match=r"off\.txt:3\) has the same prompt as sample off-00001 \(.*off\.txt:1\)"):
        load(None, str(tmp_path / "off.txt"), "eval.off_samples=3", "data.off_length=4")
    assert len(load(None, str(tmp_path / "off.txt"), "eval.off_samples=3", "data.off_length=40").off) == 3


def test_what_a_tokenizer_reads_as_the_same_is_the_same() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    config = tiny.config("nowhere", "eval.on_samples=3", "eval.off_samples=3")
    with pytest.raises(DataError, match="sample on-2 has the same demo and query as sample on-0"):
        load_samples(config, tokenizer, 1024, 500, SampleTexts(Keys(("dax", "lug", "Dax")), OFF))


def test_a_task_that_repeats_itself_for_ever_comes_to_an_end() -> None:
    config = tiny.config("nowhere", "eval.on_samples=3", "eval.off_samples=3", "data.unusable=skip")
    made = load_samples(config, tiny.tokenizer(), 1024, 500, SampleTexts(Keys(("dax", "lug") * 2_000), OFF))
    assert len(made.on) == 2
    assert [each.count for each in made.unusable] == [1_000]
    assert "keys has 2 usable samples, fewer than eval.on_samples = 3" in made.notes[0]


@dataclass(frozen=True)
class Die(GeneratedTask):
    """A task of six episodes."""

    name: ClassVar[str] = "die"
    prefix: ClassVar[str] = "die"
    template = "{input}: {output}\n"

    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        return lambda rng: ([Shot("1", "red"), Shot("2", "blue")], Question(str(rng.integers(6)), "red", 0))


def test_generated_samples_are_all_different() -> None:
    """Draws that repeat an earlier one are passed over, so that a task of six episodes has six samples, and says so."""
    config = tiny.config("nowhere", "eval.on_samples=12", "eval.off_samples=3", "data.pairs=2")
    made = load_samples(config, tiny.tokenizer(), 1024, 500, SampleTexts(Die(), OFF))
    assert len({sample.query_token_ids for sample in made.on}) == len(made.on) == 6
    assert made.notes == ("die(pairs=2, seed=42) has 6 samples, fewer than eval.on_samples = 12: all of them are taken",)
    few = load_samples(config, tiny.tokenizer(), 1024, 500, SampleTexts(PickedEpisodes(Die(), (made.on[4].sample_id,)), OFF))
    assert few.on == (made.on[4],)
    missing = SampleTexts(PickedEpisodes(Die(), ("die-42-99999",)), OFF)
    with pytest.raises(DataError, match="of which 6 were looked at, has no sample 'die-42-99999'"):
        load_samples(config, tiny.tokenizer(), 1024, 500, missing)


def test_only_the_first_samples_of_a_longer_file_are_used_and_said(tmp_path: Path) -> None:
    keys = [{**ON, "query_text": f"Word: {key}\nSymbol:"} for key in ("dax", "lug", "wug")]
    on, off = write(tmp_path / "on.jsonl", *keys), tmp_path / "off.txt"
    off.write_text("One?\n\nTwo?\n\nThree?\n")
    sizes = ("eval.on_samples=2", "eval.off_samples=2")
    assert load(on, str(off), *sizes).notes == (
        f"{on} has more samples than eval.on_samples = 2: the others are not used",
        f"{off} has more samples than eval.off_samples = 2: the others are not used",
    )
    assert load(on, None, "eval.on_samples=2", "data.unusable=skip").notes == (
        f"{on} has more samples than eval.on_samples = 2 (it has 3): the others are not used",
    )
    assert load(on, str(off), "eval.on_samples=3", "eval.off_samples=3").notes == ()
    assert load(on, None, "data.sample_ids=[on-00001]").notes == ()
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"input": f"w{i}", "output": "red"} for i in range(9)]))
    assert load(str(rows), None).notes == (
        f"{rows} has more samples than eval.on_samples = 6 (it has 9): the others are not used",
    )


def test_a_wrong_line_behind_the_last_one_is_not_read(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "on.jsonl", ON))
    path.write_text(path.read_text() + "no JSON\n")
    made = load(str(path), None, "eval.on_samples=1")
    assert len(made.on) == 1
    assert "has more samples than eval.on_samples = 1" in made.notes[0]


def test_all_bad_answers_are_counted_and_listed(tmp_path: Path) -> None:
    answers = [" light red", " dark blue", " light red", *(f" no {i} no" for i in range(45))]
    lines = [{**ON, "query_text": f"Word: {i}\nSymbol:", "answer_text": answer} for i, answer in enumerate(answers)]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "on.jsonl", *lines), None, f"eval.on_samples={len(lines)}")
    said = str(caught.value)
    assert said.startswith("48 of 48 ON samples cannot be used: 48 x answer is several tokens ('on-00001', ")
    assert "Answer is several tokens: ' light red' (2 times), ' dark blue', ' no 0 no'" in said
    assert ", and 7 more. The first: sample on-00001: answer_text ' light red' is " in said


@pytest.mark.parametrize("text", [" ", "\n\t", "\u2003"])
@pytest.mark.parametrize("chat", [True, False])
def test_blank_prompts_are_none(text: str, chat: bool) -> None:
    config = tiny.config("nowhere", "eval.on_samples=1", "eval.off_samples=2")
    texts = SampleTexts(Keys(("dax",)), (OffText("a", "Why?"), OffText("b", text)))
    with pytest.raises(DataError, match=r"^1 of 2 OFF prompts cannot be used: 1 x prompt without a token \('b'\)"):
        load_samples(config, tiny.tokenizer(chat=chat), 1024, 500, texts)


def test_a_blank_query_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="query_text is blank"):
        load(write(tmp_path / "on.jsonl", {**ON, "query_text": " \n"}), None, "eval.on_samples=1")


def test_an_answer_that_a_text_has_otherwise_is_noted(tmp_path: Path) -> None:
    line = {**ON, "demo_text": "It is 'red' here.\n", "query_text": "What is it? Answer:"}
    made = load(write(tmp_path / "on.jsonl", line), None, "eval.on_samples=1")
    (note,) = made.notes
    assert note.startswith("1 sample ('on-00001'): the demo has the answer's text only as other tokens")
