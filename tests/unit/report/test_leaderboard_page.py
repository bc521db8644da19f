"""The page of a leaderboard: one harmless file; its switch shows one measure at a time; the console shows what fits."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from pathlib import Path

import pytest

from cedkv.analysis.leaderboard import Leaderboard
from cedkv.analysis.ranking import leaderboard
from cedkv.report.leaderboard import CONSOLE_WIDTH, MEASURES, console_matrix, leaderboard_markdown
from cedkv.report.page import leaderboard as page_module
from cedkv.report.page.leaderboard import leaderboard_page
from tests.support.browser import opened, probed
from tests.support.pages import HOSTILE
from tests.unit.analysis.test_leaderboard import entry, samples

METHODS = {"attention": [1, 1, 0, 1], "delimiter": [1, 0, 0, 0], "oracle": [1, 1, 1, 1]}


def board(*tasks: str, models: tuple[str, ...] = ("m",), dull: str = "") -> Leaderboard:
    """Two candidates and a point of reference on every task; on ``dull`` the teacher does not gain."""
    entries = [
        entry(task, method, samples(right, teacher=task != dull), model=model, reference=method == "oracle")
        for model in models
        for task in tasks
        for method, right in METHODS.items()
    ]
    return leaderboard(entries, 0)


def test_page_is_one_file_that_runs_no_script_but_its_own() -> None:
    names = tuple(text for text in HOSTILE if text and text != "\ud800")
    text = leaderboard_page(
        board(*names, models=names[:2]), "<i>title</i>", "<u>", ["<s>note</s>"], {names[0]: "report_x.html"}
    )
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1 == text.count("<script")
    assert base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode() in policy[1]
    assert "unsafe" not in policy[1].replace("style-src 'unsafe-inline'", "")
    assert not re.search(r"<(img|i>|u>|s>)", text.replace('<i style="left', ""))
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {link for link in links if not link.startswith("#")} == {"report_x.html"}
    assert "choose <code>report_x.html</code> in the list of artifacts" in text, (
        "in MLflow's frame no link leads to another file"
    )


def test_matrix_has_a_row_per_method_and_greys_what_does_not_count() -> None:
    text = leaderboard_page(board("good", "dull", dull="dull"), "t")
    matrix = text[text.index('<table class="matrix">') : text.index("</table>")]
    assert re.findall(r'<th scope="rowgroup"[^>]*>([^<]*)', matrix) == ["candidates", "reference points"]
    assert re.findall(r'<th scope="row">([^<]*)', matrix) == ["attention", "delimiter", "oracle"]
    assert matrix.count("does not count") == 1
    assert len(re.findall(r'<td class="num out">', matrix)) == len(METHODS)
    for measure in MEASURES:
        assert len(re.findall(rf'data-measure="{measure.name}"( hidden)?>', matrix)) == 2 * len(METHODS)
    assert '<span data-measure="accuracy">0.75<span class="note">0.3 … 0.95</span></span>' in matrix
    assert "the teacher gains 0 on base (limit 0.1): nothing is decided about selection" in text


def test_many_methods_are_cut_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_METHODS", 2)
    text = leaderboard_page(board("a"), "t")
    assert "This page holds the first 2 of 3 methods" in text
    assert "oracle" not in text


def test_console_shows_as_many_columns_as_fit() -> None:
    lines = console_matrix(board(*(f"a_task_with_a_long_name_{i}" for i in range(9)))).splitlines()
    assert max(map(len, lines)) <= CONSOLE_WIDTH
    assert re.fullmatch(r"and \d more columns \(leaderboard.csv\)", lines[-1])
    few = console_matrix(board("one", "two", dull="two")).splitlines()
    assert few[0].split() == ["accuracy", "mean", "rank", "one", "two"]
    assert few[4].split() == ["attention", "1", "[1,", "1.5]", "0.75", "0.75"]
    assert few[-1].startswith("note     two does not count: the teacher gains 0")


def test_markdown_has_a_table_per_measure_and_names_as_text() -> None:
    sections = leaderboard_markdown(board("a|b", "<c>"))
    assert len(sections) == 1 + len(MEASURES)
    head = sections[1][2]
    assert head == "| method | mean rank | a\\|b | \\<c\\> |"
    assert {line.count(" | ") for line in sections[1][2:] if line} == {3}
    assert sections[0][0].startswith("**attention** comes first: ")


@pytest.mark.browser
def test_the_switch_shows_one_measure(tmp_path: Path) -> None:
    chromium = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no browser here")
    probe = """
      const shown = () => [...new Set([...document.querySelectorAll("#matrix [data-measure]")].filter((e) => !e.hidden)
        .map((e) => e.dataset.measure))];
      const before = shown();
      const select = document.getElementById("measure");
      select.value = "off_p99";
      select.dispatchEvent(new Event("change"));
      const name = theme.textContent;
      theme.click();
      document.body.dataset.probe = JSON.stringify([before, shown(), name !== theme.textContent]);
    """
    dom = opened(chromium, tmp_path, leaderboard_page(board("a", "b"), "t"), probe=probe)
    assert probed(dom) == [["accuracy"], ["off_p99"], True]
