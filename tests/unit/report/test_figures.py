"""Figures: which there are for a grid, what is drawn in them, and that they are harmless inside a page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from cedkv.analysis.findings import compare_conditions
from cedkv.analysis.paired import interval
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import wrapped
from cedkv.report.figures.captions import comparison_figures, run_figures
from cedkv.report.figures.plotting import figure_style, nats_axis, new_figure, save_png, to_svg
from tests.support import making
from tests.support.grids import standard


def comparison_figures_of(results: list[ConditionResult]) -> dict[str, Figure]:
    return comparison_figures(compare_conditions("x", results))


def by_name(figures: dict[str, Figure]) -> dict[str, tuple[str, Figure]]:
    return {str(figure.get_label()): (caption, figure) for caption, figure in figures.items()}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def test_every_standard_question_has_its_figure() -> None:
    results = standard()
    results[0].records.on[:] = [
        {**r, "candidate_attention": [0.1, 0.2, 0.3], "candidate_causal_drop": [0.2, 0.1, 0.4]} for r in results[0].records.on
    ]
    found = by_name(comparison_figures_of(results))
    assert list(found) == [
        "accuracy_by_condition", "kl_to_teacher_by_condition", "budget", "sinks", "positioning", "span_length", "transfer",
        "off_delta_by_condition", "off_delta_curves", "off_delta_by_selector", "attention_causal_drop",
    ]  # fmt: skip
    for caption, _ in found.values():
        assert re.search(r"n = 40|40 samples", caption), caption
    titles = [axes.get_title(loc="left") for axes in found["off_delta_by_selector"][1].axes]
    assert titles == ["attention_diversity", "transfer", "wrong_demo", "oracle"]


def test_budget_curve_is_at_the_means_with_their_intervals() -> None:
    results = standard()
    _, figure = by_name(comparison_figures_of(results))["budget"]
    axes = figure.axes[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "8"]
    family = [results[5], results[0], results[6]]
    kls = [[r["kl_select_teacher"] for r in c.records.on] for c in family]
    curve = next(line for line in axes.get_lines() if len(line.get_xdata()) == 3)
    assert curve.get_ydata() == pytest.approx([np.mean(kl) for kl in kls])
    bars = [sorted(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.8]
    low, high = interval(kls[0], 42, f"{family[0].label}-kl_to_teacher-select")
    assert any(bar == pytest.approx([low, high]) for bar in bars)
    assert {"base", "teacher", "selected spans", "random spans"} <= set(texts(figure))


def test_no_condition_for_it_no_figure() -> None:
    found = by_name(comparison_figures_of(making.grid(({}, {}), ({"select.mode": "delimiter_span"}, {}))))
    assert list(found) == [
        "accuracy_by_condition", "kl_to_teacher_by_condition", "off_delta_by_condition", "off_delta_curves"
    ]  # fmt: skip


def test_several_families_keep_their_captions_apart() -> None:
    """Selectors at two budgets are two figures of OFF curves; one caption would silently drop one of them."""
    results = making.grid(
        *[({"select.mode": mode, "select.span_budget": n}, {}) for n in ("1", "2") for mode in ("random_span", "full_demo")]
    )
    names = [str(figure.get_label()) for figure in comparison_figures_of(results).values()]
    assert names.count("off_delta_by_selector") == 2


@pytest.mark.parametrize("n", [1, 2])
def test_hardly_any_samples_can_be_drawn(n: int, recwarn: pytest.WarningsRecorder) -> None:
    """One of them, two of them, two that are identical: matplotlib warns of a panel for which no room is left."""
    for other in ({"select.span_budget": "1"}, {"prefix.padding_mode": "shrink_to_selected"}):
        for figure in comparison_figures_of(making.grid(({}, {}), (other, {"kl": 0.0, "off": 0.0}), n=n)).values():
            to_svg(figure)
    assert not [str(warning.message) for warning in recwarn]


def test_figures_of_a_single_run() -> None:
    (result, _) = making.grid(({}, {}), ({"select.mode": "delimiter_span"}, {}))
    assert [str(f.get_label()) for f in run_figures(result.records, result.results).values()] == [
        "accuracy", "off_delta", "kl_by_sample"
    ]  # fmt: skip


def test_kl_along_base_s_answers_has_a_figure_where_it_was_measured() -> None:
    """Median and 99th percentile of each position, the next token first; two prompts end before the last position."""
    (result,) = making.grid(({}, {"off": 0.25, "off_extra": making.further(0.5, 0.75)}), n=10)
    for i, record in enumerate(result.records.off):
        record["further_kl"] = [0.1 * (i + 1)] if i < 2 else [0.1 * (i + 1), 2.0]
    caption, figure = by_name(run_figures(result.records, result.results))["off_by_position"]
    worst, median, limit = figure.axes[0].get_lines()
    assert list(worst.get_xdata()) == [0, 1, 2]
    assert list(worst.get_ydata()) == pytest.approx([0.25, 1.0, 2.0])
    assert list(median.get_ydata()) == pytest.approx([0.25, 0.55, 2.0])
    assert list(limit.get_ydata()) == [1.0, 1.0]
    assert max(limit.get_xdata()) < 1, "the limit is for the next token alone"
    assert caption.endswith("n = 10 prompts, 8 at the last position.")


def test_svg_is_one_harmless_element_with_ids_of_its_own() -> None:
    """Figures share a page: equal ids would make one draw with the marks of another."""
    drawn = [to_svg(figure) for figure in comparison_figures_of(standard()).values()]
    seen: set[str] = set()
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert root.get("aria-label")
        assert not re.search(r"<script|<style|<image|https?://|javascript:|\son\w+=", svg)
        ids = {element.get("id") for element in root.iter() if element.get("id")}
        assert not ids & seen
        assert set(re.findall(r'href="#([^"]*)"', svg)) <= ids
        seen |= {str(name) for name in ids}


def test_same_figure_same_bytes_whatever_the_user_has_set(tmp_path: Path) -> None:
    def drawn(name: str) -> tuple[str, bytes]:
        figure = next(iter(comparison_figures_of(making.grid(({}, {}), ({"select.mode": "delimiter_span"}, {}))).values()))
        save_png(figure, tmp_path / name)
        return to_svg(figure), (tmp_path / name).read_bytes()

    plain = drawn("a.png")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert drawn("b.png") == plain


@pytest.mark.parametrize("values", [[1e-9, 0.1, 0.2], [0.5, 0.5], [3.0], [0.0, 0.0], []])
def test_axis_of_nats_has_ticks_and_holds_the_largest(values: list[float]) -> None:
    with figure_style():
        _, (axes,) = new_figure("x", 2.0)
        least = nats_axis(axes, "x", values)
    low, high = axes.get_xlim()
    assert 0 < least == pytest.approx(low)
    assert high > max(values, default=0)
    assert any(low <= tick <= high for tick in axes.get_xticks())


def test_long_labels_are_broken_between_settings() -> None:
    assert wrapped("attention_diversity · sink 4") == ["attention_diversity · sink 4"]
    label = "attention_diversity · span_len 4 · span_budget 8 · min_span_distance 4"
    assert wrapped(label) == ["attention_diversity", "span_len 4 · span_budget 8", "min_span_distance 4"]
