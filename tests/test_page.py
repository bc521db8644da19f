"""The HTML page: one harmless file, and, in a real browser, what it shows and does."""

import base64
import hashlib
import html as html_module
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cedkv.config import Phase2Config
from cedkv.report import page
from cedkv.report.build import Records, Results, decide, sort_records
from cedkv.report.comparison import ConditionResult
from cedkv.report.page import comparison_page, embedded, run_page
from tests import tiny
from tests.test_engine import records_of

HOSTILE = (
    "<script>alert(1)</script>", "</script><script>document.title='owned'</script>", '"><img src=x onerror=alert(1)>',
    "<!--<script>", "\u202egnp.exe", "\u2066\u2067", "a\x00b\x1bc\x7f", "\u2028\u2029", "&lt;b&gt;&amp;", "]]>", "{{ 7 * 7 }}",
    "  two\n", "", "W" * 300, "\u200b\ufeff\u00ad", "'; DROP TABLE x; --", "\ud800",
    " \u05e9\u05dc\u05d5\u05dd", "javascript:alert(1)",
)  # fmt: skip
SVG = '<svg viewBox="0 0 100 50" role="img" aria-label="a line"><path d="M0 50L100 0" stroke="currentColor"/></svg>'
ARMS = ("base", "teacher", "select")
Run = tuple[Phase2Config, Records, Results]


def hostile(token: int) -> str:
    return HOSTILE[token % len(HOSTILE)]


@pytest.fixture(scope="module")
def run(llama_folder: Path) -> Run:
    """A real run of a tiny model, whose right and wrong answers are then dealt out so that every filter has some."""
    config = tiny.config(llama_folder, "eval.on_samples=12")
    found, _, _ = records_of(llama_folder, "eval.on_samples=12")
    records = sort_records(found)
    for i, record in enumerate(records.on):
        for bit, arm in enumerate(ARMS):
            record[f"correct_{arm}"] = bool((i + 1) >> bit & 1)
        record["correct_random"] = [i % 3 == 0, i % 4 == 0]
    return config, records, decide(config, records, "2")


def page_of(run: Run, token_text: Any = hostile) -> str:
    config, records, results = run
    return run_page(config, records, results, {"A <figure>": SVG}, {"on": "<b>on</b>", "off": "off"}, "run-id", token_text)


def compared(run: Run) -> str:
    """Three conditions: the run, one whose select arm is the other way round, and one that is right throughout."""
    config, records, results = run
    other = [{**record, "correct_select": not record["correct_select"]} for record in records.on]
    all_right = [{**record, "correct_select": True} for record in records.on]
    conditions = []
    for name, on in (("first", records.on), ("other <way>", other), ("right", all_right)):
        changed = Records(on, records.off, records.selections, records.plumbing, records.repro)
        conditions.append(
            ConditionResult(f"x={name}", name, "id", config, {"x": name}, name == "right", name == "right", changed, results)
        )
    pair = {"left": "first", "right": "other <way>", "quantity": "accuracy", "n": 12, "difference": 0.25, "low": -0.1}
    pairs = [
        {**pair, "high": 0.5, "p": 0.3, "p_holm": 0.6, "verdict": "undecided", "n_needed": 410},
        {**pair, "low": None, "high": None, "p": None, "p_holm": None, "verdict": "too few", "n_needed": None},
    ]
    asked = [{"question": "Which?", "answer": "<None>"}]
    known = [{"relation": f"<relation {holds}>", "holds": holds, "figures": "0 < 1"} for holds in (True, False, None)]
    same = {"left": "first", "right": "<teacher>", "quantity": "KL", "n": 12, "largest": None, "floor": 1e-9, "limit": 1e-4}
    equal = [{**same, "verdict": "insufficient"}, {**same, "largest": 0.5, "verdict": "fail"}]
    return comparison_page("grid <1>", conditions, pairs, asked, known, equal, {}, hostile)


def test_a_relation_that_does_not_hold_and_a_broken_equality_are_said(run: Run) -> None:
    text = compared(run)
    known = re.findall(r"&lt;relation (\w+)&gt;.*?badge (\w+)", text)
    assert known == [("True", "pass"), ("False", "fail"), ("None", "insufficient")]
    equal = text[text.index('id="equal"') :]
    assert re.findall(r"&lt;teacher&gt;</th><td><span class=\"badge (\w+)\"", equal) == ["insufficient", "fail"]


def data_of(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    assert not set("<>&\u2028\u2029") & set(found[0])
    return json.loads(found[0])


@pytest.mark.parametrize("make", [page_of, compared])
def test_page_is_one_file_that_runs_no_script_but_its_own(run: Run, make: Any) -> None:
    text = make(run)
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


def test_data_comes_back_as_it_was(run: Run) -> None:
    config, records, _ = run
    data = data_of(page_of(run))
    (condition,) = data["conditions"]
    assert all(text == hostile(int(token)) for token, text in data["tokens"].items())
    assert set(data["tokens"].values()) == set(HOSTILE), "the tiny run has too few tokens to carry every hostile text"
    for shown, record, selection in zip(condition["on"], records.on, records.selections, strict=True):
        source = data["sources"][shown["source"]]
        assert (shown["id"], source["demo"]) == (record["sample_id"], selection["demo_token_ids"])
        assert [arm["right"] for arm in shown["arms"].values()] == [record[f"correct_{arm}"] for arm in ARMS]
        assert [trial["right"] for trial in shown["random"]] == record["correct_random"]
        assert shown["arms"]["select"]["kl"] == pytest.approx(record["kl_select_teacher"], rel=1e-3)
        assert source["scores"] == pytest.approx(selection["scores"], rel=1e-3)
        assert [span[:2] for span in shown["spans"][0]] == [[span["start"], span["end"]] for span in selection["spans"]]
        assert len(shown["spans"]) == 1 + config.eval.n_random_trials
    deltas = [sample["delta"] for sample in condition["off"]]
    assert deltas == sorted(deltas, reverse=True)
    assert len(deltas) == len(records.off)


def test_conditions_share_what_is_the_same(run: Run) -> None:
    data = data_of(compared(run))
    assert len(data["conditions"]) == 3
    assert len(data["sources"]) == len(run[1].on)


def test_a_big_run_is_cut_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "This page holds" not in page_of(run)
    monkeypatch.setattr(page, "MAX_SAMPLES", 5)
    text = page_of(run)
    (condition,) = data_of(text)["conditions"]
    assert [sample["id"] for sample in condition["on"]] == [record["sample_id"] for record in run[1].on[:5]]
    moved = sorted((record["phase2_delta_off_select"] for record in run[1].off), reverse=True)[:5]
    assert [sample["delta"] for sample in condition["off"]] == pytest.approx(moved, rel=1e-3)
    assert "first 5 of 12 ON samples" in text
    assert "holds the 5 most moved of 8" in text


def test_gate_a_alone_and_figures_that_are_missing(run: Run) -> None:
    """Phase 1.5 has neither random trials nor OFF prompts; a number that is not finite is a dash, not a crash."""
    config, records, _ = run
    on = [
        {**r, "correct_random": [], "token_random": [], "answer_logprob_random": [], "kl_random_teacher": []}
        for r in records.on
    ]
    results = decide(config, Records(on, [], records.selections, records.plumbing, records.repro), "1.5")
    results.comparisons[0]["difference"] = float("nan")
    on[0] |= {"kl_select_teacher": float("nan"), "answer_logprob_base": float("-inf"), "rel_kl_to_teacher": None}
    selections = [{**r, "random": []} for r in records.selections]
    less = Records(on, [], selections, records.plumbing, records.repro)
    text = page_of((config, less, results))
    (condition,) = data_of(text)["conditions"]
    assert condition["on"][0]["arms"]["select"]["kl"] is None
    assert condition["off"] == []
    assert 'id="off"' not in text
    assert "Gate B" not in text


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one condition"):
        comparison_page("x", [], [], [], [], [], {}, hostile)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(theme: int) -> None:
    css = (Path(page.__file__).parent / "templates/page.css").read_text()
    colours = {name: both[theme] for name, *both in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    pairs = [*itertools.product(("ink", "muted", "accent", "pass", "fail"), ("page", "card", "soft")), ("ink", "hot")]
    pairs += [(verdict, f"{verdict}-tint") for verdict in ("pass", "fail", "insufficient")]
    pairs += [("muted", "pass-tint"), ("muted", "fail-tint")]
    for text, ground in pairs:
        lighter, darker = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


# In a real browser. State is in the address, so that one dump of the page's elements shows what a reader would see.


@pytest.fixture(scope="module")
def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(names)}): the page was not opened in one")
    return found


def opened(chromium: str, folder: Path, text: str, address: str = "", probe: str = "", width: int = 1280) -> str:
    """The page's elements once its script has run; ``probe`` is a script of the test's own that runs last.

    Raises:
        AssertionError: anything on the browser's console.
    """
    if probe:
        digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
        text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        text = text.replace("</body>", f"<script>{probe}</script></body>")
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000",
        "--enable-logging=stderr", "--v=0", f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}",
        f"{file.as_uri()}#{address}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout.decode("utf-8", errors="replace")


def text_of(dom: str, element: str) -> str:
    found = re.search(rf'id="{element}"[^>]*>([^<]*)<', dom)
    assert found, element
    return html_module.unescape(found[1])


def listed(dom: str) -> list[str]:
    return re.findall(r'data-id="([^"]*)"', dom)


def probed(dom: str) -> Any:
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, "the probe did not finish"
    return json.loads(html_module.unescape(found[1]))


def test_the_console_is_watched(chromium: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="planted"):
        opened(chromium, tmp_path, page_of(run), probe="throw new Error('planted')")
    with pytest.raises(AssertionError, match="violates the following Content Security"):
        opened(chromium, tmp_path, page_of(run).replace("</body>", "<script>document.title = 1</script></body>"))


def test_hostile_tokens_are_shown_and_harmless(chromium: str, run: Run, tmp_path: Path) -> None:
    dom = opened(chromium, tmp_path, page_of(run))
    assert dom.count("<script") == 2
    assert not re.search(r"<img|<b>", dom)
    assert "<title>owned" not in dom
    demos = "".join(re.findall(r"<bdi[^>]*>([^<]*)</bdi>", dom))
    first = run[1].selections[0]
    shown = dom[dom.index('class="tokens demo"') :]
    shown = shown[: shown.index("</p>")]
    assert shown.count("<bdi") == len(first["demo_token_ids"])
    assert len(re.findall(r'class="t[^"]* kept', shown)) == len(first["kept_tokens"])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in demos
    for sign in ("⟨U+202E⟩gnp.exe", "␀", "␛", "␡", "⟨U+2028⟩", "··two⏎", "⟨empty⟩", "⟨U+200B⟩", "⟨U+D800⟩"):
        assert sign in demos, sign
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u2028\x00\x1b]", demos)
    assert re.search(rf'title="token 0 · id {first["demo_token_ids"][0]} · \w+ · attention [\d.e−]+ · an attention sink', shown)


def test_the_prefix_of_another_sample_is_shown_on_its_own_demo(chromium: str, run: Run, tmp_path: Path) -> None:
    config, records, results = run
    first, second = records.selections[:2]
    swapped = [{**first, **{key: second[key] for key in ("spans", "kept_tokens")}, "prefix_of": second["sample_id"]}]
    changed = Records(records.on, records.off, swapped + records.selections[1:], records.plumbing, records.repro)
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


def test_filters_show_what_the_records_say(chromium: str, run: Run, tmp_path: Path) -> None:
    """Two filters by address, all others by their counts in the menu."""
    wanted = expected(run[1].on)
    assert sum(0 < len(ids) < 12 for ids in wanted.values()) >= 10, "the run does not tell the filters apart"
    for name in ("select_right_random_wrong", "select_wrong_teacher_right"):
        dom = opened(chromium, tmp_path, page_of(run), f"filter={name}&sample={wanted[name][-1]}")
        assert listed(dom) == wanted[name]
        assert text_of(dom, "count") == f"{len(wanted[name])} of 12 samples"
        assert text_of(dom, "position") == f"{len(wanted[name])} of {len(wanted[name])}"
        assert re.findall(r'data-id="([^"]*)" aria-current="true"', dom) == [wanted[name][-1]]
    counts = dict(re.findall(r'<option value="(\w+)">[^<]*\((\d+)\)</option>', dom))
    assert counts == {name: str(len(ids)) for name, ids in wanted.items()}


def test_search_and_conditions_by_address(chromium: str, run: Run, tmp_path: Path) -> None:
    on, selections = run[1].on, run[1].selections
    word = selections[3]["query_text"].split()[1]
    dom = opened(chromium, tmp_path, page_of(run), f"query={word.upper()}")
    assert listed(dom) == [
        r["sample_id"] for r, s in zip(on, selections, strict=True) if word in s["demo_text"] + s["query_text"]
    ]
    dom = opened(chromium, tmp_path, page_of(run), "query=no+such+word&filter=constructor&condition=length&state=x")
    assert (listed(dom), text_of(dom, "count")) == ([], "0 of 12 samples")
    assert "No sample matches" in dom
    dom = opened(chromium, tmp_path, compared(run), "condition=1&filter=select_right")
    assert listed(dom) == expected(on)["select_wrong"], "the second condition is the first turned round"
    assert re.findall(r'<button[^>]* aria-pressed="(\w+)"', dom) == ["false", "true", "false"]
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


def test_keys_filter_and_theme_by_hand(chromium: str, run: Run, tmp_path: Path) -> None:
    ids = [record["sample_id"] for record in run[1].on]
    out = probed(opened(chromium, tmp_path, page_of(run), "theme=light", PROBE))
    assert out["visited"] == [ids[i] for i in (0, 1, 2, 3, 2, 1, 1)]
    assert out["focused"]
    assert out["typing"] == ids[1]
    assert out["count"] == f"{len(expected(run[1].on)['base_right'])} of 12 samples"
    assert "filter=base_right" in out["hash"]
    assert out["theme"] == "dark"


FRAME = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const inside = frame.contentDocument;
  const count = inside.getElementById("count").textContent;
  const page = inside.documentElement;
  document.body.dataset.probe = JSON.stringify([frame.contentWindow.innerWidth, page.scrollWidth, count]);
});
frame.srcdoc = PAGE;
"""


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("make", [page_of, compared])
def test_in_a_frame_of_any_width_the_page_does_not_scroll_sideways(
    chromium: str, run: Run, tmp_path: Path, width: int, make: Any
) -> None:
    """Wide tables, and tokens of 300 letters, scroll in their own boxes. A frame is where tracking servers show a page."""
    frame = f'<body><iframe width="{width}" height="800" style="border: 0"></iframe><script>{FRAME}</script></body>'
    frame = frame.replace("PAGE", json.dumps(make(run)).replace("<", "\\u003c"))
    seen, wide, count = probed(opened(chromium, tmp_path, frame, width=1400))
    assert seen == width
    assert wide <= width
    assert count == "12 of 12 samples"
