"""What Gate A and the repetitions add to a run: the engine with them against the engine without, on half the quickstart.

Half of its ON samples, of its OFF prompts and of Gate A's samples: one unit of its two, in the same proportions.
"""

from __future__ import annotations

from benchmarks.common import Row, engine, loaded, median_ratio, paired, part, quickstart, results_only, row
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import Samples

PAIRS, SHARE = 2, 2


def rows(pairs: int = PAIRS, share: int = SHARE) -> list[Row]:
    """The figure of the quickstart on the CPU."""
    return [ratio_row(*loaded(), (), "<= 1.35", pairs, share)]


def ratio_row(
    lm: LanguageModel, every: Samples, own: tuple[str, ...], target: str | None, pairs: int = PAIRS, share: int = SHARE
) -> Row:
    """Wall time with the checks over that without.

    Args:
        own: settings of the run besides the quickstart's.
        share: into how many parts the quickstart's samples are divided.
    """
    sizes = quickstart().eval
    n, checked = sizes.on_samples // share, sizes.gate_a_samples // share
    config, some = quickstart(f"eval.gate_a_samples={checked}", *own), part(every, 0, n)
    whole, without = (lambda: engine(lm, config, some)), (lambda: engine(lm, results_only(config), some))
    ratio = median_ratio(paired([whole] * pairs, [without] * pairs))
    name = f"a run with Gate A ({checked} of {n} ON samples) and its repetition over one without"
    return row(f"{name}, in {lm.meta['torch_dtype']}", ratio, target)
