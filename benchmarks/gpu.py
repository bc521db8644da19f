"""On a card: how much of it is used, the engine against the forward limit and kvpress, and peak memory against the plan.

How much is used: floating-point operations a second of bare forward passes (counted by torch, ``FlopCounterMode``), over those
of one large product of bfloat16 matrices on the same card, which is what the card can do in practice. The quickstart's model is
so small that starting its kernels takes longer than the kernels; so there is a second one, of the sizes of Llama 3.1 8B but
for its vocabulary, with random weights: what it answers means nothing, and its time and memory are those of such a model.
Without a card there is one row, not measured. The functions take a device, so that they can be tried on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import against_kvpress, checks, forward
from benchmarks.common import Row, engine, loaded, quickstart, results_only, row, seconds
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.kv import attention
from cedkv.models import cpu
from cedkv.models.batching import Batching
from cedkv.models.capabilities import read_capabilities
from cedkv.models.loading import LanguageModel
from cedkv.models.rope_detection import detect_rope_layouts
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
LARGE = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
"""The sizes of Llama 3.1 8B."""


def rows(device: str = "cuda") -> list[Row]:
    """All figures of a card."""
    if not torch.cuda.is_available():
        return [row("figures of a card; not measured: no CUDA device", None)]
    name = torch.cuda.get_device_name()
    half, every = loaded("bfloat16", device)
    product = large_product(device)
    found = [row(f"a product of bfloat16 matrices of {SIZE:,} x {SIZE:,}, TFLOP/s", product / 1e12)]
    found.append(share_row(half, "the quickstart's model", product))
    for dtype in DTYPES:
        lm, _ = loaded(dtype, device)
        own = _settings(device, dtype)
        found.append(limit_row(lm, results_only(quickstart(*own, "eval.off_tokens=0")), every))
        found.append(checks.ratio_row(lm, every, own, None))
    found += against_kvpress.rows(device=device)
    own = _settings(device, "bfloat16")
    found.append(memory_row(half, quickstart(*own), every))
    large = random_model(half, LARGE)
    found.append(share_row(large, "a model of 8B's sizes", product))
    found.append(limit_row(large, results_only(quickstart(*own, "eval.off_tokens=0")), every))
    return [{**of, "name": f"{name}: {of['name']}"} for of in found]


def _settings(device: str, dtype: str) -> tuple[str, str]:
    return f"runtime.device={device}", f"runtime.torch_dtype={dtype}"


def random_model(like: LanguageModel, sizes: Mapping[str, int]) -> LanguageModel:
    """A Llama of these sizes with random weights, on the device and in the dtype of another model, whose tokenizer it has."""
    config = LlamaConfig(vocab_size=like.vocabulary, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
    dtype = like.meta["torch_dtype"]
    with like.device:
        made = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention.register())
    model, capabilities = made.eval(), read_capabilities(config)
    layouts = detect_rope_layouts(model, like.device, capabilities.max_positions, KL_LIMIT[dtype])
    batching = Batching(None, like.device)
    return replace(like, model=model, capabilities=capabilities, batching=batching, rope_layouts=layouts, measured={})


def large_product(device: str, size: int = SIZE, repeats: int = REPEATS) -> float:
    """Operations a second of a product of large bfloat16 matrices of random numbers (of equal ones it is faster)."""
    matrix = torch.rand(size, size, device=device).sub(0.5).to(torch.bfloat16)
    return float(2 * size**3 * repeats / _best(lambda: [matrix @ matrix for _ in range(repeats)], device))


def share_row(lm: LanguageModel, name: str, product: float, rows_: int = ROWS) -> Row:
    """Operations a second of bare passes of a model, over ``product``: those of a large product of matrices."""
    lengths = [WIDTH] * rows_
    # torch counts attention over grouped heads only where the kernel is its plain one
    with cpu.torch_linear(lm.model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward.bare(lm, lengths, WIDTH * rows_)
    speed = counter.get_total_flops() / _best(lambda: forward.bare(lm, lengths, WIDTH * rows_), lm.device.type)
    name = f"share of such a product's operations a second, passes of {rows_} x {WIDTH} tokens of {name}"
    return row(f"{name} ({speed / 1e12:.3g} TFLOP/s)", speed / product)


def limit_row(lm: LanguageModel, config: Phase2Config, samples: Samples, budgets: tuple[int, ...] = BUDGETS) -> Row:
    """The engine's time over that of bare calls for the same tokens, as ``benchmarks.forward`` has it."""
    ratio, lengths, budget, _ = forward.against_limit(lm, config, samples, budgets, PAIRS)
    dtype, tokens, parameters = lm.meta["torch_dtype"], sum(lengths), sum(p.numel() for p in lm.model.parameters())
    model = f"{parameters / 1e9:.2g}B parameters in {dtype}"
    return row(f"engine over forward limit, wall time, {model} ({tokens:,} tokens; best call {budget:,})", ratio, "<= 1.3")


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
