"""Episodes built from rows: which columns, which shots, what is gold; a row's episode does not depend on what is asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cedkv.core.errors import CedkvError, DataError
from cedkv.tasks.load import load_samples
from cedkv.tasks.texts import read_sample_texts
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.user_rows import COLOURS, asked, episodes, gold, load, outputs, shots, write

ROWS = [{"text": f"w{i}", "label": COLOURS[i // 10]} for i in range(30)]
"""Sorted by their labels, as files often are."""


# shots


def test_an_episode_of_other_rows(tmp_path: Path) -> None:
    for episode in episodes(write(tmp_path, ROWS), "data.shots=5", n=30):
        row = ROWS[int(episode.sample_id.removeprefix("row-")) - 1]
        assert (episode.query_text, episode.answer_text) == (f"Q: {row['text']}\nA:", f" {row['label']}")
        assert len(shots(episode)) == 5
        assert set(shots(episode)) <= {f"Q: {r['text']}\nA: {r['label']}\n\n" for r in ROWS if r is not row}
        assert episode.labels == (" blue", " green", " red")
        assert episode.other_query_text not in (None, episode.query_text)
        same = [shot for shot in shots(episode) if shot.endswith(f"A: {row['label']}\n\n")]
        assert gold(episode) == (same[-1] if same else None)


def test_an_episode_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    many = episodes(path, n=30)
    assert episodes(path, n=7) == many[:7]
    assert len({asked(episode) for episode in many}) == 30
    assert len({episode.answer_text for episode in many[:12]}) == 3, "sorted by its labels, but asked about in another order"
    assert [e.sample_id for e in episodes(path, "seed=1", n=7)] != [e.sample_id for e in many[:7]]
    ids = [many[9].sample_id, many[2].sample_id]
    assert episodes(path, f"data.sample_ids={json.dumps(ids)}") == [many[9], many[2]]
    assert load(path, f"data.sample_ids={json.dumps(ids)}").notes == ()


def test_a_row_with_the_same_input_is_no_shot(tmp_path: Path) -> None:
    path = write(tmp_path, [{"input": "same", "output": "red"}] * 5 + [{"input": "other", "output": "red"}])
    made = episodes(path, "data.unusable=skip")
    assert [len(shots(e)) for e in made if asked(e) == "same"] == [1]
    assert [asked(e) for e in made if len(shots(e)) == 5] == ["other"]


def test_a_row_is_asked_about_once(tmp_path: Path) -> None:
    """Another row with the same input has another demo, and is answered by base alike: it is no other sample."""
    path = write(tmp_path, [*ROWS, {**ROWS[3], "label": "blue"}, ROWS[5]])
    with pytest.raises(DataError, match=r"^2 of 32 ON samples cannot be used: 2 x repeats another sample") as caught:
        load(path, n=32)
    for first, again in ((4, 31), (6, 32)):  # in the order in which rows are asked about
        places = [f"row {number}" for number in (first, again)]
        assert any(f"{a} as {b}" in str(caught.value) for a, b in (places, places[::-1]))
    left_out = load(path, "data.unusable=skip", n=32)
    assert len(left_out.on) == 30
    assert [(each.reason, each.count) for each in left_out.unusable] == [("repeats another sample", 2)]


def test_balance(tmp_path: Path) -> None:
    skewed = [{"text": f"w{i}", "label": "red" if i < 27 else COLOURS[i % 3]} for i in range(40)]
    path = write(tmp_path, skewed)
    for episode in episodes(path, "data.balance=true", "data.shots=6"):
        assert set(Counter(outputs(episode)).values()) == {2}
    orders = {tuple(outputs(episode)) for episode in episodes(path, "data.balance=true", "data.shots=6", n=12)}
    assert len(orders) > 6, "the labels stand in no fixed order"
    scarce = [{"text": f"w{i}", "label": "red" if i else "blue"} for i in range(10)]
    counts = Counter(outputs(episodes(write(tmp_path, scarce), "data.balance=true", "data.shots=6", n=1)[0]))
    assert counts[" red"] >= 5


def test_shots_from_another_file(tmp_path: Path) -> None:
    other = tmp_path / "shots.csv"
    other.write_text("Sentence,Class\n" + "".join(f"s{i},{COLOURS[i % 3]}\n" for i in range(9)))
    made = load(write(tmp_path, ROWS), f"data.shots_from={other}", "data.shots=4")
    assert all(shot.startswith("Q: s") for sample in made.on for shot in shots(sample.episode))
    assert f"shots_from={other}" in made.on_source
    with pytest.raises(DataError, match=r"^data\.shots_from = .* cannot be read"):
        load(write(tmp_path, ROWS), "data.shots_from=absent.csv")


def test_a_demo_of_about_so_many_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    for tokens in (40, 100):
        for sample in load(path, f"data.demo_tokens={tokens}").on:
            assert abs(len(sample.demo_token_ids) - tokens) < 12


def test_template(tmp_path: Path) -> None:
    (episode,) = episodes(write(tmp_path, ROWS), r"data.template='Text: {input}\nColour: {output}\n'", n=1)
    assert episode.query_text.startswith("Text: w")
    assert shots(episode)[0].startswith("Text: w")


# labels and their words


def test_words_for_labels(tmp_path: Path) -> None:
    numbered = [{"text": row["text"], "label": COLOURS.index(row["label"])} for row in ROWS]
    path = write(tmp_path, numbered)
    made = episodes(path, "data.verbalizer={0: red, 1: blue, 2: green}", n=30)
    labels = {row["text"]: row["label"] for row in ROWS}
    assert all(episode.answer_text == f" {labels[asked(episode)]}" for episode in made)
    assert made[0].labels == (" red", " blue", " green")
    with pytest.raises(
        DataError, match=r"no word for 2 labels of .*, column label: '1', '2'; it has words for 0\. Add data\.verb"
    ):
        load(path, "data.verbalizer={0: red}")


def test_words_that_a_parquet_file_has_are_taken(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "own.parquet")
    table = pa.Table.from_pylist([{"text": row["text"], "label": COLOURS.index(row["label"])} for row in ROWS])
    features = {"info": {"features": {"label": {"names": list(COLOURS), "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    assert {episode.answer_text for episode in episodes(path, n=30)} == {" red", " blue", " green"}
    assert {e.answer_text for e in episodes(path, "data.verbalizer={0: pink, 1: gold, 2: gray}", n=30)} == {
        " pink",
        " gold",
        " gray",
    }


def test_symbols_are_drawn_anew_for_every_episode(tmp_path: Path) -> None:
    topics = [{"text": row["text"], "label": f"topic {COLOURS.index(row['label'])}"} for row in ROWS]
    made = episodes(write(tmp_path, topics), "data.verbalizer=symbols", "data.shots=3", n=30)
    label_of = {row["text"]: row["label"] for row in topics}
    meanings: dict[str, set[str]] = {}
    for episode in made:
        assert episode.answer_text in outputs(episode), "the demo shows the symbol that is asked for"
        assert gold(episode) is not None
        assert episode.labels is not None
        assert len(set(episode.labels)) == 3
        meanings.setdefault(label_of[asked(episode)], set()).add(episode.answer_text)
        for shot in shots(episode):
            text, symbol = shot.removeprefix("Q: ").removesuffix("\n\n").split("\nA:")
            assert (symbol == episode.answer_text) == (label_of[text] == label_of[asked(episode)])
    assert min(map(len, meanings.values())) > 3


def test_symbols_need_labels_and_enough_symbols(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no set of labels: column output has 30 different values in 30 rows"):
        load(write(tmp_path, [{"input": f"a{i}", "output": f"b{i}"} for i in range(30)]), "data.verbalizer=symbols")
    with pytest.raises(DataError, match=r"has 40 labels, but only \d+ of the built-in symbols are one token"):
        load(write(tmp_path, [{"text": f"a{i}", "label": f"b{i % 40}"} for i in range(90)]), "data.verbalizer=symbols")


def test_outputs_that_are_no_labels(tmp_path: Path) -> None:
    """Capitals are answers of no set, and no demo holds the answer."""
    capitals = [{"input": f"country {i}", "output": "red" if i == 0 else f"x{i}"} for i in range(20)]
    (episode,) = episodes(write(tmp_path, capitals), "data.sample_ids=[row-00001]")
    assert (episode.labels, episode.gold) == (None, None)


# columns


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"Input": "q", "OUTPUT": "red"}, "{}", ("q", " red")),
        ({"sentence": "q ", "label": 1, "idx": 3}, "{}", ("q", " 1")),
        ({"sms": "q", "label": "red"}, "{}", ("q", " red")),
        ({"Class Index": "red", "Title": "t", "Description": "q"}, "{}", ("q", " red")),
        ({"text": "q", "coarse_label": "red", "fine_label": "blue"}, "{}", ("q", " red")),
        ({"text": "q", "label-coarse": "red", "label-fine": "blue"}, "{}", ("q", " red")),
        ({"text": "q", "label": 0, "label_text": "red"}, "{}", ("q", " red")),
        ({"text": "q", "label": 0, "fine": "red"}, "{output: fine}", ("q", " red")),
        ({"a": "q", "b": "red"}, "{text: a, label: b}", ("q", " red")),
        ({"question": "q", "answers": ["red", "crimson"]}, "{}", ("q", " red")),
        ({"question": "q", "answer": {"text": ["red"], "answer_start": [0]}}, "{}", ("q", " red")),
        ({"prompt": "q", "completion": " red"}, "{}", ("q", " red")),
        ({"instruction": "do", "input": "q", "output": "red"}, "{}", ("do\nq", " red")),
        ({"instruction": "do", "input": "", "output": "red"}, "{}", ("do", " red")),
        ({"source": "q", "target": "red"}, "{}", ("q", " red")),
        ({"question": "q", "choices": ["blue", "red"], "answer": 1}, "{}", ("q", " red")),
        ({"question": "q", "choices": {"text": ["blue", "red"], "label": ["A", "B"]}, "answerKey": "B"}, "{}", ("q", " red")),
        ({"text": "q", "label": 2.0, "score": 1.5}, "{}", ("q", " 2")),
        ({"text": "q", "label": True}, "{}", ("q", " true")),
    ],
)  # fmt: skip
def test_columns_are_told_by_their_names(tmp_path: Path, row: dict[str, Any], fields: str, expected: tuple[str, str]) -> None:
    other = {name: "else" if isinstance(value, str) else value for name, value in row.items() if name != "idx"}
    config = tiny.config(
        "nowhere", f"data.on_path={write(tmp_path, [row, other])}", f"data.fields={fields}", "data.unusable=skip"
    )
    on = read_sample_texts(config).on
    (episode,) = [e for e in on.episodes(request(config)) if e.sample_id in ("3", "row-00001")]  # type: ignore[attr-defined]
    assert (asked(episode), episode.answer_text) == expected


def request(config: Any) -> Any:
    from cedkv.tasks.base import TaskRequest

    return TaskRequest(9, config.seed, config.data, tiny.tokenizer(), frozenset(), {})


@pytest.mark.parametrize(
    ("rows", "override", "message"),
    [
        ([{"a": "x", "b": "y"}], "seed=1", r"found \['a', 'b'\]\. Write data\.fields=\{input: \.\.\., output: \.\.\.\}"),
        ([{"text": "only"}] * 9, "seed=1", r"found \['text'\]"),
        (ROWS, "data.fields={inptu: text}", "'inptu' is nothing that a column can be; did you mean 'input'"),
        (ROWS, "data.fields={input: txt}", r"data\.fields\.input: .* has no column 'txt'; did you mean 'text'"),
        (ROWS, "data.fields={input: text, text: label}", "names two columns as input"),
        (ROWS[:1], "seed=1", "no row is left to be a shot for sample row-00001"),
        ([*ROWS, {"text": None, "label": "red"}], "seed=1", r"row 31: text or label is empty; .*data\.unusable=skip"),
        ([*ROWS, {"text": "w", "label": " "}, {"text": "w"}], "seed=1", "row 31: text or label is empty, as in 1 more row"),
        ([{"text": "", "label": "red"}] * 4, "data.unusable=skip", "no row is left; name other columns"),
        ([*ROWS, {"text": {"a": [1]}, "label": "red"}], "seed=1", "row 31: text should be text or a number, found {'a'"),
        ([*ROWS, {"text": "\ud800", "label": "red"}], "seed=1", "row 31: text holds half a character"),
        ([{**row, "n": 7} for row in ROWS], "data.fields={id: n}", r"row 2: id '7' was already used at .*row 1; give"),
        ([{**row, "n": None} for row in ROWS], "data.fields={id: n}", "row 1: n is empty; give every row its own id"),
        (ROWS, "data.sample_ids=[row-1]", r"has no sample 'row-1'; did you mean 'row-000\d\d'"),
        (ROWS, "data.sample_ids=[row-00001, row-00001]", "names 'row-00001' twice"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path: Path, rows: Any, override: str, message: str) -> None:
    with pytest.raises(CedkvError, match=message) as caught:
        load(write(tmp_path, rows), override)
    assert len(str(caught.value)) < 1000


def test_rows_without_input_or_output_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [*ROWS, {"text": None, "label": "red"}, {"text": "w"}])
    made = load(path, "data.unusable=skip", n=40)
    assert len(made.on) == 30
    assert made.notes == (
        f"{path}: 2 rows left out: {path}: row 31: text or label is empty, as in 1 more row",
        f"{path} has 30 usable samples, fewer than eval.on_samples = 40: all of them are taken",
    )


def test_ids_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, [{**row, "id": i} for i, row in enumerate(ROWS)])
    assert [e.sample_id for e in episodes(path, "data.sample_ids=[7, 3]")] == ["7", "3"]
    repeated = load(write(tmp_path, [{**row, "id": 1} for row in ROWS]), n=30)
    assert {sample.sample_id for sample in repeated.on} == {f"row-{i:05d}" for i in range(1, 31)}
    assert "id '1' was already used" in repeated.notes[0]
    assert "named by the number of their row" in repeated.notes[0]


def test_generated_samples_by_id() -> None:
    made = load_samples(tiny.config("nowhere"), tiny.tokenizer(), 1024, 500).on
    ids = [made[3].sample_id, made[1].sample_id]
    some = load_samples(tiny.config("nowhere", f"data.sample_ids={json.dumps(ids)}"), tiny.tokenizer(), 1024, 500)
    assert some.on == (made[3], made[1])
    assert some.notes == ()


def test_generated_samples_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    points.MAX_SEARCH.replace(50, monkeypatch)
    config = tiny.config("nowhere", "data.sample_ids=[on-42-0001]")
    with pytest.raises(DataError, match=r"50 were looked at, has no sample 'on-42-0001'; did you mean 'on-42-000\d\d'"):
        load_samples(config, tiny.tokenizer(), 1024, 500)


def test_a_frame_written_by_pandas_in_every_way(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "b.tsv.gz", sep="\t", index=False)
    frame.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "d.json", orient="records", indent=2)
    frame.to_parquet(tmp_path / "e.parquet")
    made = [episodes(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len(made) == 5
    assert all(each == made[0] for each in made)


def test_rows_that_shots_are_drawn_from_are_in_no_order(tmp_path: Path) -> None:
    """Each of the other rows is as likely as any; one that always came along would be in every demo."""
    counts = Counter(shot for episode in episodes(write(tmp_path, ROWS), "data.shots=8", n=30) for shot in shots(episode))
    assert len(counts) == 30
    assert max(counts.values()) < 20
