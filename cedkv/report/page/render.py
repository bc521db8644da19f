"""``report.html``: a run, or a comparison of runs, as one file that needs no network and no server.

Verdicts and tables are HTML made here; the sample browser reads the JSON inside the page. Text out of models and samples
is hostile until shown otherwise: it goes into that JSON only, and from there into text nodes. The page's policy lets no
script run but its own, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cedkv.analysis.results import ConditionResult, Records, Results, verdict_word
from cedkv.checks.gates import Check
from cedkv.config.resolve import to_yaml
from cedkv.config.schema import Phase2Config
from cedkv.core.files import clean
from cedkv.core.text import number
from cedkv.report.page import samples as page_samples
from cedkv.report.page.samples import SampleIndex, TokenText
from cedkv.report.text import about, explain, run_name

MAX_ROWS = 15
"""Paired comparisons that are shown without folding those away that are not resolved."""

_FOLDER = Path(__file__).parent
_SCRIPTS = ("tokens.js", "page.js", "sample.js")
_QUANTITIES = {"kl_to_teacher": "KL to teacher, nats", "off_delta": "KL on OFF prompts, nats"}


def run_page(
    config: Phase2Config,
    records: Records,
    results: Results,
    figures: dict[str, str],
    sources: dict[str, str],
    run_id: str,
    token_text: TokenText,
) -> str:
    """The page of one run.

    Args:
        figures: caption -> SVG of our own making; it goes into the page as it is.
        sources: where ON and OFF samples come from, for the fine print.
        token_text: a token's text, leading space included.
    """
    name = run_name(config, results.phase)
    samples = SampleIndex(token_text)
    samples.add(name, config, records, results)
    return _render(
        "run",
        name,
        about(config, len(records.on), len(records.off)),
        samples,
        figures,
        results=results,
        comparisons=_paired(results.comparisons),
        bars=_bars(results.metrics),
        run_id=run_id,
        sources=sources,
        yaml=to_yaml(config),
    )


def comparison_page(
    name: str,
    results: Sequence[ConditionResult],
    comparisons: list[dict[str, Any]],
    questions: list[dict[str, Any]],
    relations: list[dict[str, Any]],
    equal: list[dict[str, Any]],
    figures: dict[str, str],
    token_text: TokenText,
) -> str:
    """The page of several conditions on the same samples.

    Args:
        comparisons: paired comparisons with left, right, quantity, n, difference, low, high, and where known p, p_holm,
            verdict, n_needed.
        questions: what was asked, with its answer in words.
        relations: known ones: relation, here (a word of ``questions.relations``), figures.
        equal: what must come out the same: left, right, quantity, largest, limit, floor, verdict.
        figures: caption -> SVG of our own making; it goes into the page as it is.
        token_text: a token's text, leading space included.

    Raises:
        ValueError: there is no condition.
    """
    if not results:
        raise ValueError("a comparison needs at least one condition")
    samples = SampleIndex(token_text)
    for condition in results:
        samples.add(condition.label, condition.config, condition.records, condition.results)
    return _render(
        "comparison",
        name,
        about(results[0].config, len(results[0].records.on), len(results[0].records.off)) + f", {len(results)} conditions",
        samples,
        figures,
        conditions=results,
        comparisons=_paired(comparisons),
        questions=questions,
        relations=relations,
        equal=[clean(row) for row in equal],
        checks=list(dict.fromkeys((check.gate, check.name) for c in results for check in c.results.checks)),
    )


def _render(kind: str, title: str, about: str, samples: SampleIndex, figures: dict[str, str], **more: Any) -> str:
    script = "".join((_FOLDER / "static" / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader([_FOLDER / "templates", _FOLDER / "static"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "word": verdict_word, "explain": explain, "marker": _marker, "places": _places}
    data = {"kind": kind, "tokens": samples.tokens, "sources": samples.sources, "conditions": samples.conditions}
    return environment.get_template("page.html.j2").render(
        kind=kind,
        title=title,
        about=about,
        figures=figures,
        data=embedded(data),
        script=script,
        digest=digest,
        most=page_samples.MAX_SAMPLES,
        n_on=max(condition["n_on"] for condition in samples.conditions),
        n_off=max(condition["n_off"] for condition in samples.conditions),
        **more,
    )


def embedded(data: dict[str, Any]) -> str:
    """JSON that is safe inside a ``<script>`` element: ASCII, and no ``<``, ``>`` or ``&``."""
    text = json.dumps(clean(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _marker(check: Check) -> float | None:
    """Where the observed value stands, in percent of a bar from 0 to twice the limit; beyond 100 is beyond the bar."""
    if check.observed is None or check.limit is None or not (math.isfinite(check.observed) and math.isfinite(check.limit)):
        return None
    away = check.observed - check.limit
    if check.limit == 0:
        return 50.0 + math.copysign(51.0, away) * (away != 0)
    return 50.0 + 50.0 * away / abs(check.limit)


def _bars(metrics: dict[str, float | None]) -> list[tuple[str, str, float, float | None]]:
    """Arms that were run, for the accuracy bars: name, what it sees, accuracy, spread over random trials."""
    arms = (
        ("base", "the query alone", "phase2_on_acc_base"),
        ("random", "prefix of random spans + query", "phase2_on_acc_student_random_mean"),
        ("select", "prefix of the selected spans + query", "phase2_on_acc_student_select"),
        ("teacher", "whole demonstration + query", "phase2_on_acc_teacher"),
    )
    return [
        (arm, sees, value, metrics["phase2_on_acc_student_random_std"] if arm == "random" else None)
        for arm, sees, name in arms
        if (value := metrics[name]) is not None
    ]


def _paired(comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows for the table of paired comparisons, those to fold away where there are many, and which optional columns there are.

    Intervals of one quantity are drawn on one scale, zero in the middle.
    """
    comparisons = [clean(row) for row in comparisons]
    optional = [name for name in ("p", "p_holm", "verdict", "n_needed") if any(c.get(name) is not None for c in comparisons)]
    ends = ("low", "high", "difference")
    rows = []
    for row in comparisons:
        alike = [other for other in comparisons if other["quantity"] == row["quantity"]]
        widest = max(abs(other[end] or 0.0) for other in alike for end in ends)
        at = {end: 50.0 + 48.0 * row[end] / (widest or 1.0) for end in ends if row[end] is not None}
        places = 3 - math.floor(math.log10(widest)) if widest else 1
        what = _QUANTITIES.get(row["quantity"], row["quantity"])
        rows.append({**row, "what": what, "at": at, "places": max(0, min(6, places))})
    open_ = [row for row in rows if row.get("verdict") == "not resolved"]
    if len(rows) <= MAX_ROWS:
        return {"rows": rows, "rest": [], "optional": optional}
    return {"rows": [row for row in rows if row not in open_], "rest": open_, "optional": optional}


def _number(value: float | None) -> str:
    """Four significant digits with a real minus sign; an exponent keeps its hyphen, so that it can be copied."""
    text = number(value)
    return "−" + text[1:] if text.startswith("-") else text


def _places(value: float | None, places: int) -> str:
    """A signed number with fixed places and a real minus sign."""
    if value is None:
        return "–"
    text = f"{value:+.{places}f}"
    return "0" if not text.strip("+-0.") else text.replace("-", "−")
