"""Episodes from rows that carry a demonstration of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from cedkv.core.errors import DataError
from tests.support.user_rows import COLOURS, episodes, gold, load, shots, write

RECORDS = [[f"key{i}", COLOURS[i % 3]] for i in range(9)]


def test_records(tmp_path: Path) -> None:
    path = write(tmp_path, [{"ordered_kv_records": RECORDS, "key": "key4", "value": "blue"}])
    (episode,) = episodes(path)
    assert episode.demo_text == "".join(f"{key}: {value}\n" for key, value in RECORDS)
    assert (episode.query_text, episode.answer_text, gold(episode)) == ("key4:", " blue", "key4: blue\n")
    assert (len(episode.shots or ()), episode.other_query_text) == (9, "key8:")
    (short,) = episodes(path, "data.demo_tokens=30")
    assert 2 <= len(shots(short)) < 9
    assert gold(short) == "key4: blue\n"
    for asked_key in ("key0", "key8"):
        row = {"ordered_kv_records": RECORDS, "key": asked_key, "value": dict(RECORDS)[asked_key]}
        (edge,) = episodes(write(tmp_path, [row]), "data.demo_tokens=30")
        assert gold(edge) == shots(edge)[0 if asked_key == "key0" else -1]


@pytest.mark.parametrize("value", ["red", None])
def test_records_without_the_answer(tmp_path: Path, value: str | None) -> None:
    with pytest.raises(DataError, match=r"row 1: ordered_kv_records has no record of key 'key4' and value"):
        load(write(tmp_path, [{"ordered_kv_records": RECORDS, "key": "key4", "value": value}]))
    with pytest.raises(DataError, match=r"row 1: a record of ordered_kv_records should be \[key, value\], found 'key4'"):
        load(write(tmp_path, [{"ordered_kv_records": ["key4"], "key": "key4", "value": "red"}]))


def test_needle(tmp_path: Path) -> None:
    text = "The grass is green. One colour for dax is: red. The sky is blue.\nWhat is the colour for dax?"
    row = {"index": 7, "input": text, "outputs": ["red"], "answer_prefix": " The colour for dax is", "length": 20}
    (episode,) = episodes(write(tmp_path, [row]))
    assert (episode.sample_id, episode.demo_text, episode.query_text) == ("row-00001", text, " The colour for dax is")
    assert (episode.answer_text, gold(episode)) == (" red", "One colour for dax is: red.")
    del row["answer_prefix"]
    (without,) = episodes(write(tmp_path, [{**row, "input": text + " It is"}]))
    assert (without.query_text, without.demo_text) == ("What is the colour for dax? It is", text.partition("\n")[0] + "\n")


def test_classification_with_a_context(tmp_path: Path) -> None:
    context = "Text: w1\nType: red\nText: w2\nType: blue\nText: w3\nType: red\n"
    row = {"input": "Text: w4\nType:", "context": context, "answers": ["red"], "all_classes": list(COLOURS), "_id": "a"}
    (episode,) = episodes(write(tmp_path, [row]))
    assert (episode.demo_text, episode.query_text, episode.answer_text) == (context, "Text: w4\nType:", " red")
    assert (episode.sample_id, episode.labels) == ("a", (" red", " blue", " green"))
    assert (gold(episode), len(shots(episode))) == ("Text: w3\nType: red\n", 3)


def test_questions_about_a_context(tmp_path: Path) -> None:
    context = "  The dax is red. The lug is blue. Red is a colour: red it is."
    rows = [
        {
            "context": context,
            "question": "What is the dax?",
            "answers": {"text": ["red"], "answer_start": [context.index("red")]},
        },
        {"context": context, "question": "What is the lug?", "answers": {"text": ["blue"], "answer_start": [3]}},
    ]
    made = {episode.sample_id: episode for episode in episodes(write(tmp_path, rows))}
    first, second = made["row-00001"], made["row-00002"]
    assert (first.query_text, first.answer_text) == ("Question: What is the dax?\nAnswer:", " red")
    assert (first.demo_text, first.other_query_text) == (f"{context.strip()}\n\n", second.query_text)
    assert (gold(first), gold(second)) == ("The dax is red.", "The lug is blue."), (
        "a place that does not hold it is not believed"
    )
    for override in ("data.demo_tokens=30", "data.verbalizer=symbols", "data.format=chat"):
        with pytest.raises(DataError, match=rf"^{override.partition('=')[0]}.* carries .*own \(column context\)"):
            load(write(tmp_path, rows), override)
