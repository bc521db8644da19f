"""The charts that compare selectors: which conditions are in them, at which values, and how their lines are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import binomtest

from cedkv.analysis.families import selector_name, selectors_by_budget
from cedkv.analysis.findings import compare_conditions
from cedkv.analysis.results import ConditionResult
from cedkv.config.extensions import SELECTORS
from cedkv.metrics_phase2 import relative_kl
from cedkv.report.figures.captions import comparison_figures, run_figures
from cedkv.report.figures.selector_charts import BOUNDS, styles
from cedkv.selectors.base import Selector
from cedkv.selectors.delimiter_span import DelimiterSpan
from cedkv.selectors.random_span import RandomSpan
from tests.support import making

N = 40
MODES = ("attention_diversity_span", "delimiter_span", "random_span", "oracle_span")
DEPTHS = [0.05 + 0.9 * i / (N - 1) for i in range(N)]


def draw(name: str, results: list[ConditionResult]) -> tuple[str, Figure] | None:
    found = comparison_figures(compare_conditions("x", results))
    return next(((caption, figure) for caption, figure in found.items() if figure.get_label() == name), None)


def drawn(name: str, results: list[ConditionResult]) -> tuple[str, Figure]:
    figure = draw(name, results)
    assert figure is not None
    return figure


def known(monkeypatch: pytest.MonkeyPatch, name: str, selector: type[Selector]) -> None:
    """A selector is known by this name for the length of a test."""
    monkeypatch.setitem(SELECTORS._registered, name, selector)
    monkeypatch.setitem(SELECTORS._loaded, name, selector)


def some(share: float) -> list[bool]:
    return [i < share * N for i in range(N)]


def by_budget(modes: Sequence[str], budgets: Sequence[int]) -> list[ConditionResult]:
    return making.grid(
        *[
            ({"select.mode": mode, "select.span_budget": str(budget)},
             {"correct": some(0.1 * budget + 0.1 * i), "kl": [0.1 * (i + 1) / budget + 0.01 * j for j in range(N)],
              "random": some(0.05 * budget)})
            for i, mode in enumerate(modes)
            for budget in budgets
        ],
        n=N,
    )  # fmt: skip


def curves(axes: Axes) -> dict[str, Line2D]:
    """Lines over several budgets or quarters, by their colour and dash."""
    return {f"{line.get_color()} {line.get_linestyle()}": line for line in axes.get_lines() if len(line.get_xdata()) > 2}


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_selector_over_its_budgets_at_its_means() -> None:
    """A line per selector at the means; the oracle dashed; base, teacher and the random arm, in place of ``random_span``."""
    results = by_budget(MODES, (1, 2, 4))
    caption, figure = drawn("selectors_by_budget", results)
    assert f"n = {N} ON samples; 95 % bootstrap intervals" in caption
    upper, lower = figure.axes
    assert legend_labels(figure) == ["attention_diversity", "delimiter", "oracle", "random spans", "base", "teacher"]
    accuracies = [[np.mean([r["correct_select"] for r in c.records.on]) for c in results[i : i + 3]] for i in range(0, 12, 3)]
    found = list(curves(upper).values())
    assert [line.get_linestyle() for line in found] == ["-", "-", "--", ":"]
    assert [list(line.get_ydata()) for line in found[:3]] == [pytest.approx(accuracies[i]) for i in (0, 1, 3)]
    assert list(found[3].get_ydata()) == pytest.approx([0.05, 0.1, 0.2])
    kls = [relative_kl([r["kl_select_teacher"] for r in c.records.on], [2.0] * N) for c in results[:3]]
    assert list(next(iter(curves(lower).values())).get_ydata()) == pytest.approx(kls)
    assert [label.get_text() for label in lower.get_xticklabels()] == [
        "1 span\n8 tokens",
        "2 spans\n16 tokens",
        "4 spans\n32 tokens",
    ]
    levels = {(line.get_linestyle(), line.get_ydata()[0]) for line in upper.get_lines() if list(line.get_xdata()) == [0, 1]}
    assert levels == {(":", 0.0), ("--", 1.0)}


def test_a_selector_with_one_budget_is_a_point() -> None:
    results = by_budget(MODES[:2], (1, 4)) + by_budget(("causal_drop_span",), (4,))
    _, figure = drawn("selectors_by_budget", results)
    assert "causal_drop" in legend_labels(figure)
    (last,) = [group for group in selectors_by_budget(results)[0] if len(group) == 1]
    assert selector_name(last[0]) == "causal_drop"


def test_two_selectors_at_two_budgets_or_no_figure() -> None:
    """The figure of one selector's budgets is drawn instead, and not besides."""
    one = by_budget(MODES[:1], (1, 4)) + by_budget(MODES[1:2], (4,))
    assert draw("selectors_by_budget", one) is None
    assert draw("budget", one) is not None
    two = by_budget(MODES[:2], (1, 4))
    assert draw("selectors_by_budget", two) is not None
    assert draw("budget", two) is None


def test_a_selector_that_ignores_the_budget_has_no_line() -> None:
    (group,) = selectors_by_budget(by_budget((*MODES, "full_demo"), (1, 4)))
    assert [selector_name(part[0]) for part in group] == ["attention_diversity", "delimiter", "random", "oracle"]
    assert selectors_by_budget(by_budget(("delimiter_span", "full_demo"), (1, 4))) == []


@dataclass(frozen=True)
class Smoothed(DelimiterSpan):
    """A selector with a parameter."""

    kernel: int = 1


def test_a_selector_with_other_parameters_is_another_line(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, "smoothed_span", Smoothed)
    settings = [
        {"select.mode": "smoothed_span", "select.params": f"{{kernel: {kernel}}}", "select.span_budget": n}
        for kernel in (1, 5) for n in ("1", "2")
    ]  # fmt: skip
    _, figure = drawn("selectors_by_budget", making.grid(*((s, {}) for s in settings)))
    assert legend_labels(figure)[:2] == ["smoothed", "smoothed (kernel 5)"]


def test_families_that_differ_otherwise_are_figures_of_their_own() -> None:
    settings = [
        {"select.mode": mode, "select.span_budget": n, "select.keep_sink": sink}
        for sink in ("0", "4") for mode in MODES[:2] for n in ("1", "2")
    ]  # fmt: skip
    found = comparison_figures(compare_conditions("x", making.grid(*((s, {}) for s in settings))))
    captions = [caption for caption, figure in found.items() if figure.get_label() == "selectors_by_budget"]
    assert [caption.split(":")[0] for caption in captions] == [
        "Every selector at several budgets (0 sinks)", "Every selector at several budgets (4 sinks)"
    ]  # fmt: skip


def test_many_lines_are_drawn_without_intervals_and_the_caption_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        known(monkeypatch, f"other_{i}", RandomSpan)
    caption, figure = drawn("selectors_by_budget", by_budget([*MODES, *(f"other_{i}" for i in range(9))], (1, 4)))
    assert caption.endswith(f"n = {N} ON samples, drawn without intervals.")
    assert not [line for axes in figure.axes for line in axes.get_lines() if line.get_linewidth() == 1.8]


def test_lines_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen candidates of five colours, references and the two that are dashed."""
    known(monkeypatch, BOUNDS[1], RandomSpan)
    kept = by_budget(MODES[:2], range(1, 7)) + by_budget((*BOUNDS, "sink_recent", "random_span"), (1,))
    looks = styles(kept)
    assert len({(s.colour, s.marker, s.line, s.hollow) for s in looks}) == len(looks) == 16
    assert [s.line for s in looks].count("--") == 2


def depths_of(results: list[ConditionResult]) -> tuple[str, Figure]:
    return drawn("accuracy_by_depth", results)


def test_accuracy_by_depth_with_wilsons_intervals() -> None:
    """Quarters by where the gold tokens start; the means and intervals of each, for candidates, random spans and teacher."""
    right = [i % 3 == 0 for i in range(N)]
    results = making.grid(
        ({"select.mode": "attention_diversity_span"}, {"correct": right, "depth": DEPTHS, "random": some(0.5)}),
        ({"select.mode": "oracle_span"}, {"depth": DEPTHS}),
        ({"select.mode": "delimiter_span"}, {"correct": some(0.9), "depth": DEPTHS}),
        n=N,
    )
    caption, figure = depths_of(results)
    assert f"n = {N} ON samples" in caption
    assert legend_labels(figure) == ["delimiter", "attention_diversity", "random spans", "teacher"]
    axes = figure.axes[0]
    quarters = np.clip((np.array(DEPTHS) * 4).astype(int), 0, 3)
    expected = [np.mean(np.array(right)[quarters == q]) for q in range(4)]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 4]
    assert list(lines[1].get_ydata()) == pytest.approx(expected)
    assert list(lines[3].get_ydata()) == [1.0] * 4
    bars = [sorted(line.get_ydata()) for line in axes.get_lines() if line.get_linewidth() == 1.8]
    first = np.array(right)[quarters == 0]
    wilson = binomtest(int(first.sum()), len(first)).proportion_ci(method="wilson")
    assert any(bar == pytest.approx([wilson.low, wilson.high]) for bar in bars)
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == [
        f"{name}\nn = {sum(quarters == q)}" for q, name in enumerate(("first quarter", "second", "third", "last quarter"))
    ]


def test_an_empty_quarter_stays_empty_and_a_single_one_is_no_figure() -> None:
    settings = ({"select.mode": "attention_diversity_span"}, {"select.mode": "delimiter_span"})
    ends = [0.1, 0.99] * (N // 2)
    _, figure = depths_of(making.grid(*((s, {"depth": ends}) for s in settings), n=N))
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [tick.split("\n")[1] for tick in ticks] == ["n = 20", "n = 0", "n = 0", "n = 20"]
    for depth in (None, 0.1):
        assert draw("accuracy_by_depth", making.grid(*((s, {"depth": depth}) for s in settings), n=N)) is None


def test_the_best_eight_candidates_by_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that differ from the first in the selector alone; in a grid of another kind, its conditions by their labels."""
    for i in range(9):
        known(monkeypatch, f"other_{i}", DelimiterSpan)
    settings = [{"select.mode": f"other_{i}"} for i in range(9)]
    given = [{"correct": some(0.9 - 0.05 * i), "depth": DEPTHS} for i in range(9)]
    others = [({"select.mode": "other_0", "select.keep_sink": "4"}, {"depth": DEPTHS})]
    _, figure = depths_of(making.grid(*zip(settings, given, strict=True), *others, n=N))
    assert legend_labels(figure) == [*(f"other_{i}" for i in range(8)), "random spans", "teacher"]
    place = [{"injection.positioning_mode": mode} for mode in ("compact", "absolute")]
    _, figure = depths_of(making.grid(*((s, {"depth": DEPTHS}) for s in place), n=N))
    assert legend_labels(figure) == ["compact", "absolute", "random spans", "teacher"]


def test_depth_of_a_single_run() -> None:
    (result, _) = making.grid(({}, {"depth": DEPTHS}), ({"select.mode": "delimiter_span"}, {}), n=N)
    figures = {str(figure.get_label()): figure for figure in run_figures(result.records, result.results).values()}
    assert list(figures) == ["accuracy", "off_delta", "kl_by_sample", "accuracy_by_depth"]
    assert legend_labels(figures["accuracy_by_depth"]) == ["select", "random spans", "teacher"]
    result.records.on[:] = [{**record, "correct_random": []} for record in result.records.on]
    figures = {str(figure.get_label()): figure for figure in run_figures(result.records, result.results).values()}
    assert legend_labels(figures["accuracy_by_depth"]) == ["select", "teacher"]
