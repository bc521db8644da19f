"""Compare a few selectors on the same samples, and plot the accuracy of each with its 95 % interval.

    python examples/ablate_and_plot.py --max-on 64 --out accuracy.png

It is a run like any other: gates, page and paired statistics are in ``outputs/RUN_ID``, and in MLflow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import binomtest

import cedkv

SELECTORS = "attention_diversity_span,whole_shots,snapkv,sink_recent,random_span"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder, or smollm2-135m")
    parser.add_argument("--selectors", default=SELECTORS, help="comma-separated; cedkv list selectors has all")
    parser.add_argument("--task", default="symbol_lookup", help="cedkv list tasks has all")
    parser.add_argument("--max-on", type=int, default=64, help="samples; fewer take less time and say less")
    parser.add_argument("--out", type=Path, default=Path("accuracy.png"))
    given = parser.parse_args()
    compared = cedkv.compare(
        "ablate_selector",
        select_modes=given.selectors.split(","),
        model_id=given.model,
        task=given.task,
        max_on=given.max_on,
        max_off=given.max_on,
        lds_masks=0,
    )
    plot(compared).savefig(given.out, dpi=150)
    print(f"figure   {given.out}")


def plot(compared: cedkv.Run) -> Figure:
    """Draw a row per selector, the most accurate at the top, base and teacher as lines across.

    Intervals are Wilson's for one share each. Two selectors are compared in pairs, sample by sample: ``compared.comparisons``.
    """
    figure = Figure(figsize=(6, 1.2 + 0.35 * len(compared.conditions)), layout="constrained")
    axes = figure.subplots()
    by_accuracy = sorted(compared.conditions.items(), key=lambda item: item[1].on["correct_select"].mean())
    for row, (_, condition) in enumerate(by_accuracy):
        right = condition.on["correct_select"]
        low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        axes.plot([low, high], [row, row], color="tab:blue", linewidth=2)
        axes.plot(right.mean(), row, "o", color="tab:blue")
    axes.set_yticks(range(len(by_accuracy)), [label for label, _ in by_accuracy])
    for arm, line in {"base": ":", "teacher": "--"}.items():
        level = by_accuracy[0][1].on[f"correct_{arm}"].mean()  # the same in every condition
        axes.axvline(level, color="black", linestyle=line, linewidth=1, label=f"{arm} {level:.2f}")
    axes.set(xlabel=f"accuracy, n = {len(by_accuracy[0][1].on)}", xlim=(-0.02, 1.02))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    main()
