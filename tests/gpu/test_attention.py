"""The kernels that sdpa chooses among on a card, each by itself: the same answers, and numbers where a row sees no key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cedkv.inference.distributions import kl
from cedkv.inference.forward import next_token_logprobs, prefill
from cedkv.inference.teacher import read_teacher
from cedkv.kv.attention import ScoreForm, attention_rows, cedkv_attention
from cedkv.kv.cache import assemble
from cedkv.kv.positioning import place
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import RowAttention
from tests.gpu.conftest import overrides
from tests.support import tiny

pytestmark = pytest.mark.gpu
LENGTHS = (1, 9, 40)
ROWS = [list(range(5, 5 + length)) for length in LENGTHS]
NAMES = ["short", "middle", "long"]
TAKES_MASKS = ("MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
CLOSE = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 5e-2}
"""KL of another kernel's answers, in nats."""


def forced(device: str, backend: str, dtype: str) -> SDPBackend:
    """A kernel by name; skipped where the device has none that takes this dtype."""
    if torch.version.cuda is None and device == "cuda" and backend != "MATH":
        pytest.skip("a stand-in for a card has no kernels")
    if device == "cpu" and backend not in ("MATH", "FLASH_ATTENTION"):
        pytest.skip(f"{backend} is a kernel of cards alone")
    if device == "cuda" and backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") and dtype == "float32":
        pytest.skip(f"{backend} does not take float32")
    if device == "cuda" and backend == "CUDNN_ATTENTION" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("cuDNN's attention needs a card of compute capability 8 or more")
    return getattr(SDPBackend, backend)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", TAKES_MASKS)
def test_padded_rows_and_prefixes_under_every_kernel(device: str, llama_folder: Path, backend: str, dtype: str) -> None:
    """Rows of 1 and of 40 tokens in a batch: most of what is left of the short one is padding, which sees no key at all."""
    kernel = forced(device, backend, dtype)
    _, lm = tiny.load(llama_folder, *overrides(device, f"runtime.torch_dtype={dtype}"))
    demos = ROWS[1:] + ROWS[1:2]
    placements = [place(range(len(d)), len(d), "compact", "null_pad", 48) for d in demos]

    def answers() -> list[torch.Tensor]:
        prefix = assemble(*prefill(lm, demos, [range(len(d)) for d in demos], NAMES), placements)
        return [
            next_token_logprobs(lm, ROWS, NAMES),
            next_token_logprobs(lm, ROWS, NAMES, prefix),
            next_token_logprobs(lm, ROWS, NAMES, prefix, frozenset({1, 3})),
            next_token_logprobs(lm, ROWS, NAMES, prefix, frozenset()),
        ]

    usual = answers()
    with sdpa_kernel(kernel):
        found = answers()
    for one, other in zip(found, usual, strict=True):
        assert one.isfinite().all()
        assert kl(one, other).max() < CLOSE[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_flash_attention_where_there_is_no_mask(device: str, llama_folder: Path, dtype: str) -> None:
    """It takes no mask, so it is what a single row without padding runs on."""
    kernel = forced(device, "FLASH_ATTENTION", dtype)
    _, lm = tiny.load(llama_folder, *overrides(device, f"runtime.torch_dtype={dtype}"))
    usual = next_token_logprobs(lm, ROWS[2:], NAMES[2:])
    with sdpa_kernel(kernel):
        found = next_token_logprobs(lm, ROWS[2:], NAMES[2:])
    assert found.isfinite().all()
    assert kl(found, usual).max() < CLOSE[dtype]


@pytest.mark.parametrize("backend", TAKES_MASKS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_query_that_sees_no_key_is_no_nan(device: str, backend: str, dtype: str) -> None:
    """One row in the batch is padding from start to end; the rows that see something are what they are without it."""
    kernel = forced(device, backend, dtype)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 8, 16, generator=generator).to(device, getattr(torch, dtype)) for n in (4, 2, 2))
    mask = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 1, 8, 8).clone()
    mask[1] = False
    mask[0, :, :3] = False
    mask = mask.to(device)
    module = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, 2, True  # type: ignore[assignment]
    with sdpa_kernel(kernel), torch.inference_mode():
        output, _ = cedkv_attention(module, query, key, value, mask, scaling=0.25)
    assert output.isfinite().all()
    weights = attention_rows(query, key, mask, ScoreForm(0.25), 0, 8)
    expected = (weights @ value.float().repeat_interleave(2, dim=1)).transpose(1, 2)
    seen = mask.any(dim=-1)[:, 0]
    difference = (output.float() - expected).abs().amax(dim=(2, 3))
    assert float((difference * seen).max()) < (1e-5 if dtype == "float32" else 5e-3)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma 2", "gpt-oss"])
def test_attention_is_read_as_on_the_cpu(device: str, family_folders: dict[str, Path], family: str) -> None:
    """Grouped heads, soft caps, windows and sinks; demo rows of different lengths."""
    rows = [RowAttention(window, pooling) for window in (1, 3, None) for pooling in ("mean", "max")]
    reader = AttentionReader(frozenset({0, 1, 3}), layer_readers(rows, {}, None))
    demos, queries = ROWS[1:], [[50, 51, 52], [60]]
    here, on_cpu = (
        read_teacher(tiny.load(family_folders[family], *overrides(where))[1], demos, queries, NAMES[1:], reader, keep=[0, 1])
        for where in (device, "cpu")
    )
    for reading in rows:
        for row in (0, 1):
            one, other = (output.map(reading, row, frozenset({0, 3})).cpu() for output in (here, on_cpu))
            assert (one - other).abs().max() < 1e-5
    for one, other in zip(here.demo_kv().keys, on_cpu.demo_kv().keys, strict=True):
        assert torch.allclose(one.cpu(), other, atol=1e-4)
