"""Matrix products through oneDNN: the same numbers, and only where they are meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cedkv.models import cpu
from tests.support import tiny

HAVE = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not HAVE, reason="needs a processor with AVX-512 and a torch with oneDNN; runs on such")


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_as_near_to_the_exact_product_as_torchs_own(bias: bool) -> None:
    torch.manual_seed(0)
    layer, rows = torch.nn.Linear(576, 96, bias=bias), torch.randn(3, 7, 576)
    with torch.inference_mode():
        exact = torch.nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
        before = (layer(rows) - exact).abs().max()
        assert cpu.use_onednn(layer)
        assert (layer(rows) - exact).abs().max() < 3 * before
        assert layer(rows).shape == (3, 7, 96)


@needs_onednn
def test_the_whole_model_gives_the_same_logits(model_folder: Path) -> None:
    model = tiny.model("llama")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = model(ids).logits
        assert cpu.use_onednn(model)
        assert (model(ids).logits - before).abs().max() < 1e-4 * before.abs().max()


def test_nothing_else_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, layers that are something more than linear or wrapped already, and processors it does not help."""

    class Quantised(torch.nn.Linear):
        pass

    wrapped = torch.nn.Linear(4, 4)
    wrapped.forward = wrapped.forward  # type: ignore[method-assign]  # as accelerate's hooks do
    for layer in (Quantised(4, 4), torch.nn.Linear(4, 4, dtype=torch.bfloat16), wrapped):
        before = vars(layer).get("forward")
        assert not cpu.use_onednn(layer)
        assert vars(layer).get("forward") is before
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu.use_onednn(torch.nn.Linear(4, 4))
