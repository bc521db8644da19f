"""The HTML page: one harmless file that holds what the run says."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cedkv.analysis.findings import compare_conditions
from cedkv.analysis.results import decide
from cedkv.report.page import render, samples
from cedkv.report.page.render import embedded
from cedkv.tasks.load import Unusable
from tests.support import making
from tests.support.pages import ARMS, HERE, HOSTILE, Run, compared, hostile, page_of


def test_a_relation_that_does_not_hold_and_a_broken_equality_are_said(dealt: Run) -> None:
    text = compared(dealt)
    known = re.findall(r"&lt;relation ([\w ]+)&gt;</th><td><span class=\"badge (\w+)\">([\w ]+)</span>", text)
    assert known == [(here, badge, here) for here, badge in HERE.items()]
    equal = text[text.index('id="equal"') :]
    assert re.findall(r"&lt;teacher&gt;</th><td><span class=\"badge (\w+)\"", equal) == ["insufficient", "fail"]


def data_of(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    assert not set("<>&\u2028\u2029") & set(found[0])
    return json.loads(found[0])


@pytest.mark.parametrize("make", [page_of, compared])
def test_page_is_one_file_that_runs_no_script_but_its_own(dealt: Run, make: Any) -> None:
    text = make(dealt)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1].replace("style-src 'unsafe-inline'", "")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    assert base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode() in policy[1]
    rest = text.replace(embedded(data_of(text)), "")
    assert not re.search(r"""(?i)(src|href|action)\s*=\s*["']?(?!#)\w|url\(|@import|//\w+\.\w|\bon\w+\s*=\s*["']""", rest)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", scripts[0])
    for word in ("alert(1)", "owned", "<b>on</b>", "<figure>:", "other <way>", "<None>", "grid <1>"):
        assert word not in rest


def test_data_comes_back_as_it_was(dealt: Run) -> None:
    config, records, _ = dealt
    data = data_of(page_of(dealt))
    (condition,) = data["conditions"]
    assert all(text == hostile(int(token)) for token, text in data["tokens"].items())
    assert set(data["tokens"].values()) == set(HOSTILE), "the tiny run has too few tokens to carry every hostile text"
    for shown, record, selection in zip(condition["on"], records.on, records.selections, strict=True):
        source = data["sources"][shown["source"]]
        assert (shown["id"], source["demo"]) == (record["sample_id"], selection["demo_token_ids"])
        assert [arm["right"] for arm in shown["arms"].values()] == [record[f"correct_{arm}"] for arm in ARMS]
        assert [trial["right"] for trial in shown["random"]] == record["correct_random"]
        assert shown["arms"]["select"]["kl"] == pytest.approx(record["kl_select_teacher"], rel=1e-3)
        assert data["scores"][shown["scores"]] == pytest.approx(selection["scores"], rel=1e-3)
        assert [span[:2] for span in shown["spans"][0]] == [[span["start"], span["end"]] for span in selection["spans"]]
        assert len(shown["spans"]) == 1 + config.eval.n_random_trials
    deltas = [sample["delta"] for sample in condition["off"]]
    assert deltas == sorted(deltas, reverse=True)
    assert len(deltas) == len(records.off)


def test_conditions_share_what_is_the_same(dealt: Run) -> None:
    data = data_of(compared(dealt))
    assert len(data["conditions"]) == 3
    assert len(data["sources"]) == len(data["scores"]) == len(dealt[1].on)


def test_conditions_with_scores_of_their_own_share_the_texts(dealt: Run) -> None:
    """Demo tokens, kinds and texts are in the page once per sample, scores once per sample and kind of score."""
    scored = [{**record, "scores": [-score for score in record["scores"]]} for record in dealt[1].selections]
    data = data_of(compared(dealt, scored))
    assert len(data["sources"]) == len(dealt[1].on)
    assert len(data["scores"]) == 2 * len(dealt[1].on)
    first, other, right = ([sample["scores"] for sample in condition["on"]] for condition in data["conditions"])
    assert first == right
    assert not set(first) & set(other)
    assert data["scores"][other[3]] == pytest.approx(scored[3]["scores"], rel=1e-3)


def test_gold_tokens_are_there_where_the_selection_says_them(dealt: Run) -> None:
    config, records, results = dealt
    without = [{key: value for key, value in record.items() if key != "gold_tokens"} for record in records.selections]
    known = [{**without[0], "gold_tokens": [3, 5]}, *without[1:]]
    gold = [source["gold"] for source in data_of(page_of((config, replace(records, selections=known), results)))["sources"]]
    assert gold == [[3, 5]] + [None] * (len(known) - 1)


def test_how_good_scores_are_is_shown_by_sample_and_by_condition(dealt: Run) -> None:
    """Columns and facts of what was measured alone: coverage, but neither LDS nor comprehensiveness."""
    config, records, results = dealt
    data = data_of(page_of(dealt))
    assert data["judged"] == [["gold coverage", ""], ["LDS", ""], ["comprehensiveness", "nats"]]
    shown = [sample["judged"] for sample in data["conditions"][0]["on"]]
    assert shown == [[pytest.approx(record["gold_coverage"], rel=1e-3), None, None] for record in records.on]
    text = compared(dealt)
    head = text[text.index('<table class="conditions">') : text.index("</thead>")]
    assert "gold coverage" in head
    assert "LDS" not in head
    judged = [{**record, "lds": 0.5, "comprehensiveness": -0.25} for record in records.on]
    text = compared((config, replace(records, on=judged), results))
    head = text[text.index('<table class="conditions">') : text.index("</thead>")]
    names = ["gold coverage", "LDS", "comprehensiveness"]
    assert re.findall(rf">({'|'.join(names)})<", head) == names
    assert '<td class="num">−0.25<span class="note">−0.25 … −0.25</span></td>' in text


def test_token_scores_say_whose_they_are(dealt: Run) -> None:
    (condition,) = data_of(page_of(dealt))["conditions"]
    assert {sample["scores_of"] for sample in condition["on"]} == {"selector"}


def test_conditions_are_shown_by_group(dealt: Run) -> None:
    """In a group from the most accurate down: the first condition is right 5 times of 12, the other one 7 times."""
    text = compared(dealt)
    assert data_of(text)["groups"] == [["query-aware candidates", [1, 0]], ["reference points", [2]]]
    table = text[text.index('class="conditions"') : text.index("Every check of every condition")]
    rows = re.findall(r'<th scope="row(?:group" colspan="\d+)?">([^<]*?)\s*(?:<span class="mark">(\w+)</span>|<)', table)
    assert rows == [
        ("query-aware candidates", ""), ("other &lt;way&gt;", ""), ("first", "first"), ("reference points", ""),
        ("right", "oracle"),
    ]  # fmt: skip
    assert table.count("<tbody>") == table.count("</tbody>") == 2


def test_an_answer_of_several_tokens_and_base_s_own_answer_are_in_the_data(dealt: Run) -> None:
    config, records, results = dealt
    first = records.selections[0]
    selections = [first | {"answer_token_ids": [first["answer_token_id"], 7, 8]}, *records.selections[1:]]
    off = [record | making.further(0.5, 0.25, entropy=1.5, changed=[1]) for record in records.off]
    data = data_of(page_of((config, replace(records, selections=selections, off=off), results)))
    (condition,) = data["conditions"]
    assert data["sources"][condition["on"][0]["source"]]["answer"] == [first["answer_token_id"], 7, 8]
    shown = condition["off"][0]
    (record,) = [record for record in off if record["sample_id"] == shown["id"]]
    assert (shown["answer"], shown["further"], shown["entropy"]) == ([2, 3], [0.5, 0.25], 1.5)
    assert shown["same"] == [record["same_token"], True, False]
    assert {"2", "3", "7", "8"} <= set(data["tokens"])


def test_records_of_older_runs_have_no_further_positions(dealt: Run) -> None:
    config, records, results = dealt
    added = making.further()
    old = [{key: value for key, value in record.items() if key not in added} for record in records.off]
    selections = [{key: value for key, value in r.items() if key != "answer_token_ids"} for r in records.selections]
    data = data_of(page_of((config, replace(records, off=old, selections=selections), results)))
    (condition,) = data["conditions"]
    assert [(shown["answer"], shown["further"], shown["entropy"]) for shown in condition["off"]] == [([], [], None)] * len(old)
    assert [source["answer"] for source in data["sources"]] == [[r["answer_token_id"]] for r in selections]


def test_what_was_not_decided_and_how_samples_were_taken_stand_at_the_head(dealt: Run) -> None:
    """Above the verdict, of a run and of a comparison; a check that says the same refers to it."""
    config, records, _ = dealt
    on = [{**record, "correct_teacher": False} for record in records.on]
    untaught = replace(records, on=on)
    results = decide(config, untaught.collected(), "2")
    for text in (page_of((config, untaught, results)), compared((config, untaught, results))):
        head = text[text.index("<main>") : text.index('id="verdict"')]
        assert re.search(r'class="undecided">.*The teacher itself gains -?0\.\d+ on base \(limit 0\.1\)', head)
        assert text.count("says nothing about the selection") == 1
    assert "<code>teacher_gain</code> see above" in page_of((config, untaught, results))
    known = page_of(dealt, notes=("<b>short</b>",), unusable=(Unusable("ON", "too long", 3, ("<i>",)),))
    head = known[known.index("<main>") : known.index('id="verdict"')]
    assert "<li>&lt;b&gt;short&lt;/b&gt;.</li>" in head
    assert "<li>3 of 15 ON samples left out: too long (first: &lt;i&gt;, ...).</li>" in head


def test_accuracy_among_labels_is_drawn_where_there_are_labels(dealt: Run) -> None:
    config, records, _ = dealt
    labels = making.among_labels(0.25)
    bare = [{key: value for key, value in record.items() if key not in labels} for record in records.on]
    without, labelled = (
        page_of((config, replace(records, on=on), decide(config, replace(records, on=on).collected(), "2")))
        for on in (bare, [record | labels for record in bare])
    )
    assert "Among labels" not in without
    section = labelled[labelled.index("Among labels") : labelled.index('<dl class="facts">')]
    found = re.findall(r'<div class="(\w+)">.*?<span class="num">([\d.]+)</span>', section, re.DOTALL)
    assert found == [("base", "0"), ("random", "0.5"), ("select", "1"), ("teacher", "1")]
    assert "KL ratio among labels" in labelled


def test_a_big_run_is_cut_and_says_so(dealt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "This page holds" not in page_of(dealt)
    monkeypatch.setattr(samples, "MAX_SAMPLES", 5)
    text = page_of(dealt)
    (condition,) = data_of(text)["conditions"]
    assert [sample["id"] for sample in condition["on"]] == [record["sample_id"] for record in dealt[1].on[:5]]
    moved = sorted((record["phase2_delta_off_select"] for record in dealt[1].off), reverse=True)[:5]
    assert [sample["delta"] for sample in condition["off"]] == pytest.approx(moved, rel=1e-3)
    assert "first 5 of 12 ON samples" in text
    assert "holds the 5 most moved of 8" in text


def test_gate_a_alone_and_figures_that_are_missing(dealt: Run) -> None:
    """Phase 1.5 has neither random trials nor OFF prompts; a number that is not finite is a dash, not a crash."""
    config, records, _ = dealt
    on = [
        {**r, "correct_random": [], "token_random": [], "answer_logprob_random": [], "kl_random_teacher": []}
        for r in records.on
    ]
    results = decide(config, replace(records, on=on, off=[]).collected(), "1.5")
    results.comparisons[0]["difference"] = float("nan")
    on[0] |= {"kl_select_teacher": float("nan"), "answer_logprob_base": float("-inf"), "rel_kl_to_teacher": None}
    selections = [{**r, "random": []} for r in records.selections]
    less = replace(records, on=on, off=[], selections=selections)
    text = page_of((config, less, results))
    (condition,) = data_of(text)["conditions"]
    assert condition["on"][0]["arms"]["select"]["kl"] is None
    assert condition["off"] == []
    assert 'id="off"' not in text
    assert "Gate B" not in text


def test_a_comparison_of_nothing_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one condition"):
        compare_conditions("x", [])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(theme: int) -> None:
    css = (Path(render.__file__).parent / "static/page.css").read_text()
    colours = {name: both[theme] for name, *both in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    pairs = [*itertools.product(("ink", "muted", "accent", "pass", "fail"), ("page", "card", "soft")), ("ink", "hot")]
    pairs += [(verdict, f"{verdict}-tint") for verdict in ("pass", "fail", "insufficient")]
    pairs += [("muted", "pass-tint"), ("muted", "fail-tint")]
    for text, ground in pairs:
        lighter, darker = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)
