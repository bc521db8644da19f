"""Matrix products through oneDNN, and memory that is kept: the same numbers, and only where they are meant to be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cedkv.models import cpu
from tests.support import tiny
from tests.support.waiting import PATIENCE

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


@pytest.fixture
def mallopt_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What ``keep_freed_memory`` asks of the C library, which is a stand-in; no setting of the user's."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    return calls


def test_the_allocator_is_told_to_keep_freed_memory(mallopt_calls: list[tuple[int, int]]) -> None:
    """Both thresholds: memory is not given back at the end of the heap, and blocks of a K/V cache's size lie in the heap."""
    cpu.keep_freed_memory()
    assert set(mallopt_calls) == {(cpu.M_TRIM_THRESHOLD, 1 << 30), (cpu.M_MMAP_THRESHOLD, 32 << 20)}
    assert (cpu.M_TRIM_THRESHOLD, cpu.M_MMAP_THRESHOLD) == (-1, -3), "as malloc.h has them"


def test_the_users_own_setting_of_the_allocator_stays(
    mallopt_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    cpu.keep_freed_memory()
    assert mallopt_calls == []


def test_other_systems_and_c_libraries_have_no_such_setting(
    mallopt_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    cpu.keep_freed_memory()
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: SimpleNamespace())
    cpu.keep_freed_memory()
    assert mallopt_calls == []


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs Linux with glibc; runs there"
)
def test_glibc_takes_both_values() -> None:
    """``mallopt`` answers 1 when it has taken a value, 0 when the value is out of range; in a process of its own."""
    program = (
        "import ctypes; mallopt = ctypes.CDLL(None).mallopt; "
        f"print(mallopt({cpu.M_MMAP_THRESHOLD}, {cpu.MMAP_BYTES}), mallopt({cpu.M_TRIM_THRESHOLD}, {cpu.TRIM_BYTES}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout.split() == ["1", "1"]
