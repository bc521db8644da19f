"""Loading onto a card, exact products of float32, and passes that outgrow its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cedkv.core.errors import ConfigError
from cedkv.models.batching import PASS_TOKENS, Batching
from cedkv.models.devices import pick_device
from cedkv.models.fingerprint import fingerprint, weights_digest
from tests.gpu.conftest import overrides
from tests.support import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_all_of_a_model_is_where_the_run_is(device: str, llama_folder: Path) -> None:
    config, lm = tiny.load(llama_folder, *overrides(device))
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device} == {lm.device.type}
    assert pick_device(config.runtime.device) == lm.device or device == "cuda"
    assert lm.meta["device"].split(":")[0] == device
    assert lm.meta["device_name"]
    on_cpu = tiny.load(llama_folder)[1]
    assert weights_digest(lm.model) == weights_digest(on_cpu.model)
    identity = fingerprint(lm)
    assert identity["runtime.device"] == device
    assert lm.rope_layouts is not None
    assert [layout.layout for layout in lm.rope_layouts] == [layout.layout for layout in on_cpu.rope_layouts or ()]


def test_the_card_is_what_auto_takes(device: str) -> None:
    if device == "cuda":
        assert pick_device("auto").type == device
        with pytest.raises(ConfigError, match=r"cuda:99.*is not available"):
            pick_device("cuda:99")
    else:
        assert pick_device(device).type == device


@pytest.mark.usefixtures("precision")
def test_products_of_float32_are_exact_whatever_was_set(
    device: str, llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_float32_matmul_precision("high")
    with caplog.at_level(logging.WARNING):
        _, lm = tiny.load(llama_folder, *overrides(device))
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert lm.meta["tf32"] is False
    assert "set_float32_matmul_precision was 'high'" in caplog.text
    left, right = (torch.rand(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    product = left.to(device) @ right.to(device)
    assert (product.cpu().double() - left.double() @ right.double()).abs().max() < 1e-4  # TF32: 1e-2


def test_a_pass_that_does_not_fit_is_halved(card: str) -> None:
    """Real exhaustion of the card's memory, by a limit that this process sets itself."""
    torch.cuda.empty_cache()
    device, batching = torch.device(card), Batching(None, torch.device(card))
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 64 * 2**20) / total))
    try:
        width = PASS_TOKENS["cuda"] // 16
        passes = [
            len(rows)
            for rows, _ in batching.passes(
                [width] * 16, lambda rows: torch.empty(len(rows) << 23, dtype=torch.uint8, device=device).numel()
            )
        ]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(passes) == 16
    assert max(passes) < 16
    assert batching.halved["runtime.halved_rows"] == 8
