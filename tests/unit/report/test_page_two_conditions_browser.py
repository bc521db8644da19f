"""A sample under two conditions, side by side on the page, in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import opened, probed
from tests.support.pages import Run, compared, page_of

pytestmark = pytest.mark.browser


def two_selections(run: Run) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """The run's selections with other spans and negative scores; what the first sample keeps in the run, and here."""
    first, *rest = run[1].selections
    kept = first["kept_tokens"]
    start = next(i for i in range(len(first["demo_token_ids"]) - 4) if 0 < len({*range(i, i + 4)} & {*kept}) < 4)
    moved = list(range(start, start + 4))
    spans = [{"start": start, "end": start + 4, "score": 0.5}]
    scores = [-float(i) for i in range(len(first["scores"]))]
    changed = {**first, "spans": spans, "kept_tokens": moved, "scores": scores, "gold_tokens": [start, start + 2]}
    return [changed, *rest], kept, moved


def tokens_of(dom: str, side: str) -> list[tuple[set[str], str, str]]:
    """Classes, title and style of each token of a side."""
    shown = dom[dom.index(f'<section class="side" id="{side}"') :]
    shown = shown[shown.index('class="tokens demo') : shown.index('class="legend"')]
    found = re.findall(r'<bdi class="([^"]*)" title="([^"]*)"(?: style="([^"]*)")?', shown)
    return [(set(names.split()), title, style) for names, title, style in found]


def test_a_sample_under_two_conditions_side_by_side(chromium: str, dealt: Run, tmp_path: Path) -> None:
    changed, kept, moved = two_selections(dealt)
    dom = opened(chromium, tmp_path, compared(dealt, changed), "condition=0&other=1")
    assert re.findall(r'<h5 id="side-\w+"><span class="label">(\w+) </span><bdi>([^<]*)</bdi>', dom) == [
        ("left", "first"),
        ("right", "other &lt;way&gt;"),
    ]
    left, right = tokens_of(dom, "left"), tokens_of(dom, "right")
    assert len(left) == len(right) == len(changed[0]["demo_token_ids"])
    both = set(kept) & set(moved)
    for own, other, shown, place, elsewhere in ((kept, moved, left, "left", "right"), (moved, kept, right, "right", "left")):
        for i, (names, title, _) in enumerate(shown):
            wanted = {"kept": i in own, "both": i in both, "there": i in other and i not in own}
            assert {name: name in names for name in wanted} == wanted, (place, i)
            said = "kept by both" if i in both else f"kept only {place}" if i in own else f"kept only {elsewhere}"
            assert (said in title) == (i in own or i in other)
    assert [i for i, (names, *_) in enumerate(right) if "gold" in names] == moved[:2]
    heats = [int(re.search(r"--heat: (\d+)%", style)[1]) for _, _, style in right[1:]]  # type: ignore[index]
    assert (heats[0], heats[-1]) == (100, 0), "scores below zero are coloured from the least to the largest"
    assert heats == sorted(heats, reverse=True)
    assert "token score, −" in dom
    counts = re.findall(r"<dt>(kept by both|only left|only right)</dt><dd>(\d+)", dom)
    assert counts == [
        ("kept by both", str(len(both))), ("only left", str(len({*kept} - both))), ("only right", str(len({*moved} - both)))
    ]  # fmt: skip
    record = dealt[1].on[0]
    answers = re.findall(r'<section class="side".*?<span class="hidden">(\w+)</span>', dom, re.DOTALL)
    assert answers == [("right", "wrong")[not record["correct_select"]], ("right", "wrong")[record["correct_select"]]]
    assert dom.count("KL to teacher</dt>") == dom.count('aria-label="most probable next tokens"') - 2 == 2
    assert re.search(r'<option value="pair_differs">[^<]*\(12\)', dom)
    marked = re.findall(r'<bdi>([^<]*)</bdi></button><span class="mark">(left|right)</span>', dom)
    assert marked == [("other &lt;way&gt;", "right"), ("first", "left")]


def test_a_run_alone_offers_nothing_to_compare_with(chromium: str, dealt: Run, tmp_path: Path) -> None:
    dom = opened(chromium, tmp_path, page_of(dealt), "other=1")
    assert re.search(r'<label id="other-box" hidden', dom)
    assert 'class="side"' not in dom
    assert "pair_differs" not in re.findall(r'<option value="(\w+)"', dom)


def test_prefixes_of_different_demonstrations_are_not_compared(chromium: str, dealt: Run, tmp_path: Path) -> None:
    first, second, *rest = dealt[1].selections
    foreign = {**first, "spans": second["spans"], "kept_tokens": second["kept_tokens"], "prefix_of": second["sample_id"]}
    dom = opened(chromium, tmp_path, compared(dealt, [{**foreign, "gold_tokens": [0, 1]}, second, *rest]), "other=1")
    assert "The two prefixes are of different demonstrations" in dom
    right = tokens_of(dom, "right")
    assert len(right) == len(second["demo_token_ids"])
    assert not any({"both", "there", "gold"} & names for names, *_ in right)


PAIR = """
const out = {};
const select = (id, value) => {
  const box = document.getElementById(id);
  box.value = value;
  box.dispatchEvent(new Event("change"));
};
const names = () => [...document.querySelectorAll(".side h5 bdi")].map((name) => name.textContent);
const tops = () => [...document.querySelectorAll(".side .demo")].map((demo) => demo.getBoundingClientRect().top);
const options = (id) => [...document.getElementById(id).options].map((option) => option.value);
out.before = names();
out.groups = [...document.querySelectorAll("#other optgroup")].map((group) => group.label);
select("other", "2");
out.chosen = [names(), options("other"), location.hash];
out.tops = tops();
select("condition", "2");
out.swapped = [names(), location.hash];
document.getElementById("next").click();
out.next = [names(), document.querySelector("[aria-current]").dataset.id];
document.getElementById("scores").click();
out.numbers = document.querySelectorAll(".side .demo small").length === document.querySelectorAll(".side .demo bdi").length;
select("state", "1");
out.trial = document.querySelectorAll(".side .greedy .label")[0].textContent;
out.label = document.getElementById("other").labels[0].textContent.trim();
out.wide = document.documentElement.scrollWidth <= innerWidth;
select("other", "");
out.after = [names(), location.hash];
document.body.dataset.probe = JSON.stringify(out);
"""


def test_the_second_condition_by_hand(chromium: str, dealt: Run, tmp_path: Path) -> None:
    """Chosen, swapped, kept while samples change and in the address, given up again."""
    out = probed(opened(chromium, tmp_path, compared(dealt), "theme=light", PAIR))
    assert (out["before"], out["groups"]) == ([], ["query-aware candidates", "reference points"])
    names, options, address = out["chosen"]
    assert (names, options) == (["first", "right"], ["", "1", "2"])
    assert "other=2" in address
    assert out["tops"][0] == pytest.approx(out["tops"][1], abs=1), "the two demonstrations stand at different heights"
    names, address = out["swapped"]
    assert names == ["right", "first"], "the condition that is chosen at the left goes there, and the one there to the right"
    assert {"condition=2", "other=0"} <= set(re.split("[#&]", address))
    assert out["next"] == [["right", "first"], dealt[1].on[1]["sample_id"]]
    assert out["numbers"]
    assert "random trial 1" in out["trial"]
    assert out["label"].startswith("Compare with")
    assert out["wide"]
    names, address = out["after"]
    assert names == []
    assert "other" not in address
