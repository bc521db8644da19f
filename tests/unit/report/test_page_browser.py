"""The HTML page in a real browser. Its state is in the address, so that one dump of its elements shows what is seen."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cedkv.report.page.leaderboard import leaderboard_page
from tests.support import making
from tests.support.browser import listed, opened, probed, text_of
from tests.support.pages import Run, compared, page_of
from tests.unit.report.test_leaderboard_page import board as task_board

pytestmark = pytest.mark.browser


def test_the_console_is_watched(chromium: str, dealt: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="planted"):
        opened(chromium, tmp_path, page_of(dealt), probe="throw new Error('planted')")
    with pytest.raises(AssertionError, match="violates the following Content Security"):
        opened(chromium, tmp_path, page_of(dealt).replace("</body>", "<script>document.title = 1</script></body>"))


def test_hostile_tokens_are_shown_and_harmless(chromium: str, dealt: Run, tmp_path: Path) -> None:
    dom = opened(chromium, tmp_path, page_of(dealt))
    assert dom.count("<script") == 2
    assert not re.search(r"<img|<b>", dom)
    assert "<title>owned" not in dom
    demos = "".join(re.findall(r"<bdi[^>]*>([^<]*)</bdi>", dom))
    first = dealt[1].selections[0]
    shown = dom[dom.index('class="tokens demo"') :]
    shown = shown[: shown.index("</p>")]
    assert shown.count("<bdi") == len(first["demo_token_ids"])
    assert len(re.findall(r'class="t[^"]* kept', shown)) == len(first["kept_tokens"])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in demos
    for sign in ("⟨U+202E⟩gnp.exe", "␀", "␛", "␡", "⟨U+2028⟩", "··two⏎", "⟨empty⟩", "⟨U+200B⟩", "⟨U+D800⟩"):
        assert sign in demos, sign
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u2028\x00\x1b]", demos)
    assert re.search(rf'title="token 0 · id {first["demo_token_ids"][0]} · \w+ · score [\d.e−]+ · an attention sink', shown)


def test_base_s_own_answer_is_shown_with_what_changes(chromium: str, dealt: Run, tmp_path: Path) -> None:
    """Of two tokens and three positions the first token stays, the second changes, and what would come next stays."""
    config, records, results = dealt
    off = [record | making.further(0.5, 0.25, changed=[0]) | {"same_token": True} for record in records.off]
    off[0] |= {"further_same": [True, True]}
    selections = [record | {"answer_token_ids": [record["answer_token_id"], 7]} for record in records.selections]
    run = config, replace(records, off=off, selections=selections), results
    dom = opened(chromium, tmp_path, page_of(run))
    own = re.findall(r'<div class="own">(.*?)</div>', dom, re.DOTALL)
    assert len(own) == len(off)
    assert sum("1 of 3 positions change, KL 0.375 on average further on" in text for text in own) == len(off) - 1
    changed = [re.findall(r'<bdi class="piece( changed)?" title="[^"]*token id (\d)\)', text) for text in own]
    assert changed.count([("", "2"), (" changed", "3")]) == len(off) - 1
    assert changed.count([("", "2"), ("", "3")]) == 1
    asked = dom[dom.index('class="asked"') :]
    assert len(re.findall(r'<bdi class="piece answer"', asked[: asked.index('class="scroll"')])) == 2
    only = opened(chromium, tmp_path, page_of(run), "changed=1")
    assert text_of(only, "off-count") == f"{len(off) - 1} of {len(off)} prompts"


def test_the_prefix_of_another_sample_is_shown_on_its_own_demo(chromium: str, dealt: Run, tmp_path: Path) -> None:
    config, records, results = dealt
    first, second = records.selections[:2]
    swapped = [{**first, **{key: second[key] for key in ("spans", "kept_tokens")}, "prefix_of": second["sample_id"]}]
    changed = replace(records, selections=swapped + records.selections[1:])
    dom = opened(chromium, tmp_path, page_of((config, changed, results)))
    assert "The prefix of another sample is injected here" in dom
    shown = dom[dom.index('class="tokens demo"') :]
    shown = shown[: shown.index("</p>")]
    assert [int(found) for found in re.findall(r"· id (\d+) ·", shown)] == second["demo_token_ids"]
    kept = [int(found) for found in re.findall(r'class="t[^"]* kept[^"]*" title="token (\d+)', shown)]
    assert kept == second["kept_tokens"]


def expected(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What each filter shows, from the records alone."""
    table = {
        "all": lambda r: True,
        "select_right_random_wrong": lambda r: r["correct_select"] and not any(r["correct_random"]),
        "select_wrong_random_right": lambda r: not r["correct_select"] and any(r["correct_random"]),
        "select_right_base_wrong": lambda r: r["correct_select"] and not r["correct_base"],
        "select_wrong_base_right": lambda r: not r["correct_select"] and r["correct_base"],
        "select_right_teacher_wrong": lambda r: r["correct_select"] and not r["correct_teacher"],
        "select_wrong_teacher_right": lambda r: not r["correct_select"] and r["correct_teacher"],
        "select_right": lambda r: r["correct_select"],
        "select_wrong": lambda r: not r["correct_select"],
        "base_right": lambda r: r["correct_base"],
        "teacher_wrong": lambda r: not r["correct_teacher"],
        "select_farther_than_base": lambda r: r["rel_kl_to_teacher"] > 1,
    }
    return {name: [r["sample_id"] for r in records if test(r)] for name, test in table.items()}


def test_filters_show_what_the_records_say(chromium: str, dealt: Run, tmp_path: Path) -> None:
    """Two filters by address, all others by their counts in the menu."""
    wanted = expected(dealt[1].on)
    assert sum(0 < len(ids) < 12 for ids in wanted.values()) >= 10, "the run does not tell the filters apart"
    for name in ("select_right_random_wrong", "select_wrong_teacher_right"):
        dom = opened(chromium, tmp_path, page_of(dealt), f"filter={name}&sample={wanted[name][-1]}")
        assert listed(dom) == wanted[name]
        assert text_of(dom, "count") == f"{len(wanted[name])} of 12 samples"
        assert text_of(dom, "position") == f"{len(wanted[name])} of {len(wanted[name])}"
        assert re.findall(r'data-id="([^"]*)" aria-current="true"', dom) == [wanted[name][-1]]
    counts = dict(re.findall(r'<option value="(\w+)">[^<]*\((\d+)\)</option>', dom))
    assert counts == {name: str(len(ids)) for name, ids in wanted.items()}


def test_search_and_conditions_by_address(chromium: str, dealt: Run, tmp_path: Path) -> None:
    on, selections = dealt[1].on, dealt[1].selections
    word = selections[3]["query_text"].split()[1]
    dom = opened(chromium, tmp_path, page_of(dealt), f"query={word.upper()}")
    assert listed(dom) == [
        r["sample_id"] for r, s in zip(on, selections, strict=True) if word in s["demo_text"] + s["query_text"]
    ]
    dom = opened(chromium, tmp_path, page_of(dealt), "query=no+such+word&filter=constructor&condition=length&state=x")
    assert (listed(dom), text_of(dom, "count")) == ([], "0 of 12 samples")
    assert "No sample matches" in dom
    dom = opened(chromium, tmp_path, compared(dealt), "condition=1&filter=select_right")
    assert listed(dom) == expected(on)["select_wrong"], "the second condition is the first turned round"
    pressed = re.findall(r'<button[^>]* aria-pressed="(\w+)"[^>]*><bdi>([^<]*)</bdi>', dom)
    assert pressed == [("true", "other &lt;way&gt;"), ("false", "first"), ("false", "right")]
    assert re.search(r'<option value="select_differs">[^<]*\(12\)', dom)


PROBE = """
const out = {};
const current = () => document.querySelector("[aria-current]").dataset.id;
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const button = () => document.querySelector("[aria-current]");
out.visited = [current()];
button().focus();
for (const key of ["j", "ArrowRight", "ArrowDown", "k", "ArrowLeft", "x"]) {
  press(button(), key);
  out.visited.push(current());
}
out.focused = document.activeElement === button();
press(document.getElementById("query"), "j");
out.typing = current();
const filter = document.getElementById("filter");
filter.value = "base_right";
filter.dispatchEvent(new Event("change"));
out.count = document.getElementById("count").textContent;
out.hash = location.hash;
document.getElementById("theme").click();
out.theme = getComputedStyle(document.documentElement).colorScheme;
document.body.dataset.probe = JSON.stringify(out);
"""


def test_keys_filter_and_theme_by_hand(chromium: str, dealt: Run, tmp_path: Path) -> None:
    ids = [record["sample_id"] for record in dealt[1].on]
    out = probed(opened(chromium, tmp_path, page_of(dealt), "theme=light", PROBE))
    assert out["visited"] == [ids[i] for i in (0, 1, 2, 3, 2, 1, 1)]
    assert out["focused"]
    assert out["typing"] == ids[1]
    assert out["count"] == f"{len(expected(dealt[1].on)['base_right'])} of 12 samples"
    assert "filter=base_right" in out["hash"]
    assert out["theme"] == "dark"


FRAME = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const inside = frame.contentDocument;
  const other = inside.getElementById("other");
  other.value = "1";
  other.dispatchEvent(new Event("change"));
  const lefts = [...inside.querySelectorAll(".side")].map((side) => Math.round(side.getBoundingClientRect().left));
  const count = inside.getElementById("count").textContent;
  const page = inside.documentElement;
  document.body.dataset.probe = JSON.stringify([frame.contentWindow.innerWidth, page.scrollWidth, count, new Set(lefts).size]);
});
frame.srcdoc = PAGE;
"""


@pytest.mark.parametrize(("width", "columns"), [(400, 1), (1280, 2)])
@pytest.mark.parametrize("make", [page_of, compared])
def test_in_a_frame_of_any_width_the_page_does_not_scroll_sideways(
    chromium: str, dealt: Run, tmp_path: Path, width: int, columns: int, make: Any
) -> None:
    """Wide tables, and tokens of 300 letters, scroll in their own boxes. A frame is where tracking servers show a page. Two
    conditions stand side by side where there is room, and else one above the other.
    """
    frame = f'<body><iframe width="{width}" height="800" style="border: 0"></iframe><script>{FRAME}</script></body>'
    frame = frame.replace("PAGE", json.dumps(make(dealt)).replace("<", "\\u003c"))
    seen, wide, count, lefts = probed(opened(chromium, tmp_path, frame, width=1400))
    assert seen == width
    assert wide <= width
    assert count == "12 of 12 samples"
    assert lefts == (columns if make is compared else 0)


FOLLOW = """
document.documentElement.style.scrollBehavior = "auto"; // no smooth scrolling: it takes time
const link = document.querySelector(%s), section = document.querySelector(%s), before = scrollY;
link.click();
parent.postMessage({ moved: scrollY - before, at: section.getBoundingClientRect().top, href: link.href }, "*");
"""


def followed(chromium: str, folder: Path, page: str, link: str, section: str = "body") -> Any:
    """Where a page in MLflow's frame is after a click on a link."""
    probe = FOLLOW % (json.dumps(link), json.dumps(section))
    return json.loads(text_of(opened(chromium, folder, page, probe=probe, framed=True), "said"))


def test_links_in_mlflow_s_frame(chromium: str, dealt: Run, tmp_path: Path) -> None:
    """There the browser itself follows none: sections are scrolled to all the same, and no other file takes a page's place."""
    found = followed(chromium, tmp_path, page_of(dealt), 'nav a[href="#samples"]', "#samples")
    assert found["moved"] > 300
    assert abs(found["at"]) < 100
    board = leaderboard_page(task_board("x", "y"), "t", links={"x": "report_x.html"})
    assert followed(chromium, tmp_path, board, "#task-1 a") == {"moved": 0, "at": 0, "href": ""}
    assert '<a href="report_x.html">' in board
