"""On a card: how much of it is used, the engine against the forward limit and kvpress, and peak memory against the plan.

How much is used: floating-point operations a second of bare forward passes (counted by torch, ``FlopCounterMode``), over those
of one large product of bfloat16 matrices on the same card, which is what the card can do in practice. Without a card there is
one row, not measured. The functions take a device, so that they can be tried on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import against_kvpress, forward
from benchmarks.common import Row, engine, loaded, quickstart, results_only, row, seconds
from cedkv.config.schema import Phase2Config
from cedkv.models import cpu
from cedkv.models.loading import LanguageModel
from cedkv.runs.planning import plan_run
from cedkv.runs.resolved import resolve_inputs
from cedkv.tasks.load import Samples

SIZE, REPEATS = 8192, 20
"""Rows and columns of the large matrices, and products that are timed together."""
BUDGETS = (2048, 8192, 16_384, 65_536)
"""Tokens of a bare call, among which the best is looked for."""
ROWS, WIDTH = 256, 128
"""Rows and tokens of the bare calls whose operations are counted."""
PAIRS = 3
DTYPES = ("bfloat16", "float32")


def rows(device: str = "cuda") -> list[Row]:
    """All figures of a card."""
    if not torch.cuda.is_available():
        return [row("figures of a card; not measured: no CUDA device", None)]
    name = torch.cuda.get_device_name()
    half, every = loaded("bfloat16", device)
    found = share_rows(half, device)
    for dtype in DTYPES:
        lm, _ = loaded(dtype, device)
        config = results_only(quickstart(f"runtime.device={device}", f"runtime.torch_dtype={dtype}", "eval.off_tokens=0"))
        found.append(limit_row(lm, config, every))
    found += against_kvpress.rows(PAIRS, len(every.on), device)
    found.append(memory_row(half, quickstart(f"runtime.device={device}", "runtime.torch_dtype=bfloat16"), every))
    return [{**of, "name": f"{name}: {of['name']}"} for of in found]


def share_rows(lm: LanguageModel, device: str, size: int = SIZE, rows_: int = ROWS, repeats: int = REPEATS) -> list[Row]:
    """Operations a second of bare passes of the model, and their share of those of a large product of bfloat16 matrices."""
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    product = 2 * size**3 * repeats / _best(lambda: [matrix @ matrix for _ in range(repeats)], device)
    lengths = [WIDTH] * rows_
    with cpu.torch_linear(lm.model), FlopCounterMode(display=False) as counter:
        forward.bare(lm, lengths, WIDTH * rows_)
    model = counter.get_total_flops() / _best(lambda: forward.bare(lm, lengths, WIDTH * rows_), device)
    return [
        row(f"share of a large product's operations a second, forward passes of {rows_} x {WIDTH} tokens", model / product),
        row(f"a product of bfloat16 matrices of {size:,} x {size:,}, TFLOP/s", product / 1e12),
    ]


def limit_row(lm: LanguageModel, config: Phase2Config, samples: Samples, budgets: tuple[int, ...] = BUDGETS) -> Row:
    """The engine's time over that of bare calls for the same tokens, as ``benchmarks.forward`` has it."""
    ratio, lengths, budget, _ = forward.against_limit(lm, config, samples, budgets, PAIRS)
    dtype, tokens = lm.meta["torch_dtype"], sum(lengths)
    return row(f"engine over forward limit in {dtype}, wall time ({tokens:,} tokens; best call {budget:,})", ratio, "<= 1.3")


def memory_row(lm: LanguageModel, config: Phase2Config, samples: Samples) -> Row:
    """The most that was allocated on the card in a run of the engine, weights included, over what ``cedkv plan`` says."""
    planned = plan_run(resolve_inputs("phase2", config, "2"), lambda _: None).peak
    used = peak(lm, lambda: engine(lm, config, samples))
    if used is None or planned is None:
        return row("peak memory over the plan's; not measured: no CUDA device", None, "<= 1")
    return row(f"peak memory over the plan's (GB: {used / 1e9:.2f}, {planned / 1e9:.2f})", used / planned, "<= 1")


def peak(lm: LanguageModel, work: Callable[[], Any]) -> int | None:
    """Bytes that are allocated on a model's card at most while something runs; None where it is on no card.

    Other models that this process has loaded are not counted.
    """
    if lm.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in lm.model.parameters())
    return torch.cuda.max_memory_allocated() - before + weights


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of three calls, the card's work included."""

    def done() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    done()
    return min(seconds(done) for _ in range(3))
