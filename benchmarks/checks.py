"""What Gate A and the repetitions add to a run: the engine with them against the engine without, on half the quickstart.

Half of its ON samples, of its OFF prompts and of Gate A's samples: one unit of its two, in the same proportions.
"""

from __future__ import annotations

from benchmarks.common import Row, engine, loaded, median_ratio, paired, part, quickstart, results_only, row

PAIRS, SHARE = 3, 2


def rows(pairs: int = PAIRS, share: int = SHARE) -> list[Row]:
    """Wall time with the checks over that without; ``share``: into how many parts the quickstart's samples are divided."""
    lm, every = loaded()
    sizes = quickstart().eval
    n, checked = sizes.on_samples // share, sizes.gate_a_samples // share
    config, some = quickstart(f"eval.gate_a_samples={checked}"), part(every, 0, n)
    whole, without = (lambda: engine(lm, config, some)), (lambda: engine(lm, results_only(config), some))
    ratio = median_ratio(paired([whole] * pairs, [without] * pairs))
    name = f"a run with Gate A ({checked} of {n} ON samples) and its repetition over one without"
    return [row(name, ratio, "<= 1.35")]
