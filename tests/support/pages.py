"""Pages under test: of a tiny run whose answers are dealt out, of a comparison made of it, with hostile tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cedkv.analysis.results import ConditionResult, Records, Results, decide, sort_records
from cedkv.config.schema import Phase2Config
from cedkv.report.page.render import comparison_page, run_page
from tests.support import tiny

HOSTILE = (
    "<script>alert(1)</script>", "</script><script>document.title='owned'</script>", '"><img src=x onerror=alert(1)>',
    "<!--<script>", "\u202egnp.exe", "\u2066\u2067", "a\x00b\x1bc\x7f", "\u2028\u2029", "&lt;b&gt;&amp;", "]]>", "{{ 7 * 7 }}",
    "  two\n", "", "W" * 300, "\u200b\ufeff\u00ad", "'; DROP TABLE x; --", "\ud800",
    " \u05e9\u05dc\u05d5\u05dd", "javascript:alert(1)",
)  # fmt: skip
SVG = '<svg viewBox="0 0 100 50" role="img" aria-label="a line"><path d="M0 50L100 0" stroke="currentColor"/></svg>'
ARMS = ("base", "teacher", "select")
HERE = {"holds": "pass", "does not hold": "fail", "not resolved": "insufficient", "not refuted": "insufficient"}
"""What is said of a known relation, and the badge it is said in."""
Run = tuple[Phase2Config, Records, Results]


def hostile(token: int) -> str:
    return HOSTILE[token % len(HOSTILE)]


def dealt_out(llama_folder: Path) -> Run:
    """A real run of a tiny model, whose right and wrong answers are then dealt out so that every filter has some."""
    config = tiny.config(llama_folder, "eval.on_samples=12")
    records = sort_records(tiny.records(llama_folder, "eval.on_samples=12"))
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
    known = [{"relation": f"<relation {here}>", "here": here, "figures": "0 < 1"} for here in HERE]
    same = {"left": "first", "right": "<teacher>", "quantity": "KL", "n": 12, "largest": None, "floor": 1e-9, "limit": 1e-4}
    equal = [{**same, "verdict": "insufficient"}, {**same, "largest": 0.5, "verdict": "fail"}]
    return comparison_page("grid <1>", conditions, pairs, asked, known, equal, {}, hostile)
