"""Coverage against accuracy, and attention to gold tokens by head: what is drawn, and when there is no figure."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from cedkv.analysis.findings import compare_conditions
from cedkv.analysis.results import ConditionResult, Records
from cedkv.report.figures.captions import comparison_figures, run_figures
from cedkv.report.figures.plotting import to_svg
from cedkv.report.figures.quality_charts import gold_attention
from tests.support import making

MODES = ("attention_diversity_span", "delimiter_span", "random_span", "wrong_demo")


def heads(total: list[list[float]], n: int, window: int | None = None) -> dict[str, object]:
    return {"type": "heads", "window": window, "layers": [5, 9], "total": total, "n": n}


@pytest.fixture
def results() -> list[ConditionResult]:
    """Half of twelve samples say where their answer is; all these are wrong. The prefix of another demo covers nothing."""
    found = making.grid(*[({"select.mode": mode}, {"correct": [i % 2 == 0 for i in range(12)]}) for mode in MODES])
    for number, c in enumerate(found[:3]):
        for record in c.records.on[1::2]:
            record["gold_coverage"] = 0.25 * number
    return found


def figures_of(results: list[ConditionResult]) -> dict[str, tuple[str, Figure]]:
    drawn = comparison_figures(compare_conditions("x", results))
    return {str(figure.get_label()): (caption, figure) for caption, figure in drawn.items()}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def test_coverage_against_accuracy_of_the_samples_with_gold(results: list[ConditionResult]) -> None:
    caption, figure = figures_of(results)["coverage_accuracy"]
    assert "n = 6 ON samples" in caption
    points = [line for line in figure.axes[0].get_lines() if line.get_marker() in ("o", "^")]
    where = {(line.get_marker(), line.get_xdata()[0], line.get_ydata()[0]) for line in points}
    assert where == {("o", 0.0, 0.0), ("^", 0.25, 0.0), ("o", 0.5, 0.0)}
    assert {"1", "2", "3", "attention_diversity", "delimiter", "random"} <= set(texts(figure))
    assert "wrong_demo" not in texts(figure)
    assert "query-agnostic candidates" in texts(figure)


def test_points_on_one_another_share_a_label(results: list[ConditionResult]) -> None:
    for record in results[1].records.on[1::2]:
        record["gold_coverage"] = 0.0
    _, figure = figures_of(results)["coverage_accuracy"]
    assert "1, 2" in texts(figure)


def test_no_coverage_no_figure(results: list[ConditionResult]) -> None:
    for c in results[1:]:
        for record in c.records.on:
            record.pop("gold_coverage", None)
    assert "coverage_accuracy" not in figures_of(results)


def test_attention_to_gold_tokens_is_the_mean_over_all_units() -> None:
    found = gold_attention([heads([[1.0, 0.0], [0.5, 3.0]], 4), heads([[0.0, 0.5], [0.5, 1.0]], 1)])
    assert found is not None
    assert found.n == 5
    assert found.mass == pytest.approx(np.array([[0.2, 0.1], [0.2, 0.8]]))
    assert found.largest(2) == [(9, 1, pytest.approx(0.8)), (5, 0, pytest.approx(0.2))]
    assert gold_attention([]) is None


def test_a_cell_per_layer_and_head_with_the_layers_own_numbers(results: list[ConditionResult]) -> None:
    records = Records(results[0].records.on, heads=[heads([[2.0, 0.0], [0.001, 4.0]], 5)])
    drawn = run_figures(records, results[0].results)
    caption, figure = next((c, f) for c, f in drawn.items() if f.get_label() == "gold_attention")
    assert "all query tokens" in caption
    assert "layer 9 head 1 (0.8), layer 5 head 0 (0.4)" in caption
    assert "n = 5 ON samples" in caption
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "9"]
    (cells,) = axes.findobj(PolyCollection)
    corners = [tuple(path.vertices.min(axis=0)) for path in cells.get_paths()]
    assert dict(zip(corners, cells.get_facecolors()[:, 3], strict=True)) == {(-0.5, -0.5): 0.5, (0.5, 0.5): 1.0}
    assert bar.get_ylim() == (0, pytest.approx(0.8))


def test_a_map_per_reading_with_ids_of_its_own(results: list[ConditionResult]) -> None:
    """Three conditions read two kinds of rows: a map of each kind, and the one of both that read the same is drawn once."""
    for c, window in ((results[0], None), (results[1], None), (results[2], 1)):
        object.__setattr__(c.records, "heads", [heads([[1.0], [0.0]], 2, window)])
    found = figures_of(results)
    assert [name for name in found if name.startswith("gold_attention")] == ["gold_attention", "gold_attention_1"]
    assert "the last query token" in found["gold_attention_1"][0]
    assert "layer 5 head 0 (0.5)" in found["gold_attention"][0]
    svg = to_svg(found["gold_attention_1"][1])
    assert "<image" not in svg
    assert 'id="gold_attention_1-' in svg


def test_attention_that_is_nowhere_can_be_drawn(results: list[ConditionResult]) -> None:
    records = Records(results[0].records.on, heads=[heads([[0.0], [0.0]], 2)])
    labels = [figure.get_label() for figure in run_figures(records, results[0].results).values()]
    assert "gold_attention" in labels
