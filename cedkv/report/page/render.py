"""``report.html``: a run, or a comparison of runs, as one file that needs no network and no server.

Verdicts and tables are HTML made here; the sample browser reads the JSON inside the page. Text from models and samples is
treated as hostile: it goes into that JSON only, and from there into text nodes. The page's Content-Security-Policy allows
no script but the page's own, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cedkv.analysis.best import by_group
from cedkv.analysis.comparison import series
from cedkv.analysis.contrasts import mean_and_interval
from cedkv.analysis.findings import ComparisonResult
from cedkv.analysis.quantities import JUDGED, QUANTITIES
from cedkv.analysis.results import ConditionResult, verdict_word
from cedkv.checks.base import CheckResult
from cedkv.config.resolve import to_yaml
from cedkv.core.files import clean
from cedkv.core.text import number, sentence
from cedkv.report.page import samples as page_samples
from cedkv.report.page.samples import ConditionSamples, SampleIndex, TokenText
from cedkv.report.text import beyond_limit, describe_run, explain, percent, run_name, samples_of

MAX_ROWS = 15
"""Paired comparisons up to which those that are not resolved stay unfolded."""

_FOLDER = Path(__file__).parent
_SCRIPTS = ("tokens.js", "page.js", "demo.js", "sample.js", "off.js")


def run_page(
    result: ConditionResult,
    shown: ConditionSamples,
    figures: dict[str, str],
    sources: Mapping[str, str],
    token_text: TokenText,
) -> str:
    """Return the page of one run.

    Args:
        shown: its samples.
        figures: caption -> SVG of ``figures.plotting.to_svg``; it goes into the page unescaped.
        sources: where the ON and OFF samples come from, shown with the settings.
        token_text: returns a token's text, leading space included.
    """
    config, records, results = result.config, result.records, result.results
    samples = SampleIndex(token_text)
    samples.add(result, shown)
    return _render(
        "run",
        run_name(config, results.phase),
        describe_run(config, len(records.on), len(records.off)),
        samples,
        figures,
        results=results,
        comparisons=_paired_table(results.comparisons),
        undecided=results.undecided,
        notes=samples_of(result),
        bars=_accuracy_bars(results.metrics),
        label_bars=_accuracy_bars(results.metrics, "_labels"),
        beyond=beyond_limit(result),
        run_id=result.run_id,
        sources=sources,
        yaml=to_yaml(config),
    )


def comparison_page(
    comparison: ComparisonResult, shown: Sequence[ConditionSamples], figures: dict[str, str], token_text: TokenText
) -> str:
    """Return the page of several conditions on the same samples.

    Args:
        shown: the samples of every condition, in their order.
        figures: caption -> SVG of ``figures.plotting.to_svg``; it goes into the page unescaped.
        token_text: returns a token's text, leading space included.
    """
    conditions = comparison.conditions
    samples = SampleIndex(token_text)
    for condition, condition_samples in zip(conditions, shown, strict=True):
        samples.add(condition, condition_samples)
    first = conditions[0]
    size = describe_run(first.config, len(first.records.on), len(first.records.off))
    return _render(
        "comparison",
        comparison.name,
        f"{size}, {len(conditions)} conditions",
        samples,
        figures,
        undecided=comparison.undecided,
        notes=list(dict.fromkeys(note for c in conditions for note in samples_of(c))),
        first=first,
        conditions=by_group(conditions),
        judged=[quantity for quantity in JUDGED if any(series(c, quantity) for c in conditions)],
        comparisons=_paired_table(comparison.comparisons),
        questions=comparison.questions,
        relations=comparison.relations,
        equal=[clean(row) for row in comparison.identical],
        checks=list(dict.fromkeys((check.gate, check.name) for c in conditions for check in c.results.checks)),
    )


def _render(kind: str, title: str, subtitle: str, samples: SampleIndex, figures: dict[str, str], **context: Any) -> str:
    return render_page(
        "page.html.j2",
        _SCRIPTS,
        kind=kind,
        title=title,
        subtitle=subtitle,
        figures=figures,
        data=embedded({"kind": kind, **samples.data}),
        max_samples=page_samples.MAX_SAMPLES,
        n_on=max(condition["n_on"] for condition in samples.conditions),
        n_off=max(condition["n_off"] for condition in samples.conditions),
        **context,
    )


def render_page(template: str, scripts: Sequence[str], **context: Any) -> str:
    """Return a page whose Content-Security-Policy allows no script but these files and ``frame.js``, joined."""
    script = "".join((_FOLDER / "static" / name).read_text(encoding="utf-8") for name in (*scripts, "frame.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(script=script, digest=digest, **context)


@cache
def _environment() -> Environment:
    """Return what renders pages, with the templates that it has compiled."""
    environment = Environment(
        loader=FileSystemLoader([_FOLDER / "templates", _FOLDER / "static"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "word": verdict_word,
        "explain": explain,
        "beyond_limit": beyond_limit,
        "percent": percent,
        "sentence": sentence,
        "bar_position": _bar_position,
        "mean_and_interval": mean_and_interval,
        "places": _places,
    }
    return environment


def embedded(data: dict[str, Any]) -> str:
    """Return JSON that is safe inside a ``<script>`` element: ASCII, and no ``<``, ``>`` or ``&``."""
    text = json.dumps(clean(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _bar_position(check: CheckResult) -> float | None:
    """Return the place of the observed value in percent of a bar from 0 to twice the limit; it may lie outside the bar."""
    if check.observed is None or check.limit is None or not (math.isfinite(check.observed) and math.isfinite(check.limit)):
        return None
    distance = check.observed - check.limit
    if check.limit == 0:
        return 50.0 + math.copysign(51.0, distance) * (distance != 0)
    return 50.0 + 50.0 * distance / abs(check.limit)


def _accuracy_bars(metrics: dict[str, float | None], labels: str = "") -> list[tuple[str, str, float, float | None]]:
    """Return, for each arm that was run: name, input, accuracy, standard deviation over random trials.

    Args:
        labels: ``_labels`` for the accuracy among labels, whose deviation is not measured.
    """
    arms = (
        ("base", "the query alone", "base"),
        ("random", "prefix of random spans + query", "student_random_mean"),
        ("select", "prefix of the selected spans + query", "student_select"),
        ("teacher", "whole demonstration + query", "teacher"),
    )
    std = None if labels else metrics["phase2_on_acc_student_random_std"]
    return [
        (arm, arm_input, accuracy, std if arm == "random" else None)
        for arm, arm_input, name in arms
        if (accuracy := metrics[f"phase2_on_acc{labels}_{name}"]) is not None
    ]


def _paired_table(comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of paired comparisons. Intervals of one quantity are drawn on one scale, with zero in the middle.

    Returns:
        rows: the rows that are always visible.
        folded: those that are folded away: where there are many, the rows that are not resolved.
        optional: which of the optional columns there are.
        better: the better direction of each quantity in the table, in words.
    """
    comparisons = [clean(row) for row in comparisons]
    optional = [name for name in ("p", "p_holm", "verdict", "n_needed") if any(c.get(name) is not None for c in comparisons)]
    ends = ("low", "high", "difference")
    rows = []
    for row in comparisons:
        same_quantity = [c for c in comparisons if c["quantity"] == row["quantity"]]
        largest = max(abs(c[end] or 0.0) for c in same_quantity for end in ends)
        percent = {end: 50.0 + 48.0 * row[end] / (largest or 1.0) for end in ends if row[end] is not None}
        places = 3 - math.floor(math.log10(largest)) if largest else 1
        label = QUANTITIES[row["quantity"]].label_with_unit
        rows.append({**row, "label": label, "percent": percent, "places": max(0, min(6, places))})
    present = {row["quantity"] for row in rows}
    better = [quantity.better for quantity in QUANTITIES.values() if quantity.name in present]
    table = {"rows": rows, "folded": [], "optional": optional, "better": better}
    if len(rows) > MAX_ROWS:
        table["rows"] = [row for row in rows if row.get("verdict") != "not resolved"]
        table["folded"] = [row for row in rows if row.get("verdict") == "not resolved"]
    return table


def _number(value: float | None, digits: int = 4) -> str:
    """Return significant digits with a real minus sign; an exponent keeps its hyphen, so that the number can be copied."""
    text = number(value, digits)
    return "−" + text[1:] if text.startswith("-") else text


def _places(value: float | None, places: int) -> str:
    """Return a signed number with fixed decimal places and a real minus sign."""
    if value is None:
        return "–"
    text = f"{value:+.{places}f}"
    return "0" if not text.strip("+-0.") else text.replace("-", "−")
