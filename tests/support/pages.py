"""Pages under test: of a tiny run whose answers are dealt out, of a comparison made of it, with hostile tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cedkv.analysis.best import Best
from cedkv.analysis.findings import ComparisonResult
from cedkv.analysis.results import ConditionResult, Records, Results, decide
from cedkv.config.resolve import resolve_over
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.report.page.render import comparison_page, run_page
from cedkv.report.page.samples import ConditionSamples
from cedkv.report.text import run_name
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


@dataclass(frozen=True)
class AllRecords:
    """The records of a run by type, all of them in memory."""

    on: list[Record]
    off: list[Record]
    selections: list[Record]
    plumbing: list[Record]
    repro: list[Record]

    @classmethod
    def of(cls, records: list[Record]) -> AllRecords:
        def kind(name: str) -> list[Record]:
            return [record for record in records if name in (record["type"], record.get("kind"))]

        return cls(*(kind(name) for name in ("on", "off", "selection", "plumbing", "repro")))

    def collected(self) -> Records:
        """What figures are computed from."""
        kept = [len(selection["kept_tokens"]) for selection in self.selections]
        return Records(self.on, self.off, self.plumbing, self.repro, kept)

    def shown(self) -> ConditionSamples:
        """What a page shows of them."""
        samples = ConditionSamples()
        for on, selection in zip(self.on, self.selections, strict=True):
            samples.add_on(on, selection)
        for off in self.off:
            samples.add_off(off)
        return samples


Run = tuple[Phase2Config, AllRecords, Results]


def hostile(token: int) -> str:
    return HOSTILE[token % len(HOSTILE)]


def dealt_out(llama_folder: Path) -> Run:
    """A real run of a tiny model, whose right and wrong answers are then dealt out so that every filter has some."""
    config = tiny.config(llama_folder, "eval.on_samples=12")
    records = AllRecords.of(tiny.records(llama_folder, "eval.on_samples=12"))
    for i, record in enumerate(records.on):
        for bit, arm in enumerate(ARMS):
            record[f"correct_{arm}"] = bool((i + 1) >> bit & 1)
        record["correct_random"] = [i % 3 == 0, i % 4 == 0]
    return config, records, decide(config, records.collected(), "2")


def page_of(run: Run, token_text: Any = hostile, **of_samples: Any) -> str:
    """The page of a run; ``of_samples``: its ``notes`` and ``unusable``."""
    config, records, results = run
    name = run_name(config, results.phase)
    result = ConditionResult("run", name, "run-id", config, records.collected(), results, **of_samples)
    return run_page(result, records.shown(), {"A <figure>": SVG}, {"on": "<b>on</b>", "off": "off"}, token_text)


def compared(run: Run, selections: list[Record] | None = None) -> str:
    """Three conditions: the run, one whose select arm is the other way round, and one that is right throughout.

    Args:
        selections: those of the second condition; None for the run's own.
    """
    config, records, results = run
    other = [{**record, "correct_select": not record["correct_select"]} for record in records.on]
    all_right = [{**record, "correct_select": True} for record in records.on]
    conditions, shown = [], []
    for name, on in (("first", records.on), ("other <way>", other), ("right", all_right)):
        selected = selections if selections and name == "other <way>" else records.selections
        changed = replace(records, on=list(on), selections=selected)
        role = resolve_over(config, {"select.mode": "oracle_span"}) if name == "right" else config
        conditions.append(ConditionResult(f"x={name}", name, "id", role, changed.collected(), results, {"x": name}))
        shown.append(changed.shown())
    pair = {"left": "first", "right": "other <way>", "quantity": "accuracy", "n": 12, "difference": 0.25, "low": -0.1}
    pairs = [
        {**pair, "high": 0.5, "p": 0.3, "p_holm": 0.6, "verdict": "undecided", "n_needed": 410},
        {**pair, "low": None, "high": None, "p": None, "p_holm": None, "verdict": "too few", "n_needed": None},
    ]
    asked = [{"question": "Which?", "answer": "<None>"}]
    known = [{"relation": f"<relation {here}>", "here": here, "figures": "0 < 1"} for here in HERE]
    same = {"left": "first", "right": "<teacher>", "quantity": "KL", "n": 12, "largest": None, "floor": 1e-9, "limit": 1e-4}
    equal = [{**same, "verdict": "insufficient"}, {**same, "largest": 0.5, "verdict": "fail"}]
    comparison = ComparisonResult("grid <1>", conditions, Best(None, "", "none"), pairs, asked, known, equal)
    return comparison_page(comparison, shown, {}, hostile)
