"""Where the tests of this folder run: on a card where there is one; else they are skipped, and say so.

What they assert can be tried without a card: ``CEDKV_TEST_DEVICE=cpu`` runs them on the CPU, ``CEDKV_TEST_DEVICE=stand-in`` on
tensors that are as strict about devices as a card (``tests.support.card``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SETTING = "CEDKV_TEST_DEVICE"
SMALL = ("eval.on_samples=4", "eval.off_samples=4", "eval.gate_a_samples=2")


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    """The device of the tests, as ``runtime.device`` names it."""
    import torch

    wanted = os.environ.get(SETTING, "cuda")
    if wanted == "stand-in":
        from tests.support import card

        with card.stand_in():
            yield "cuda"
        return
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device here (torch {torch.__version__}); {SETTING}=cpu or stand-in tries the test without one")
    yield wanted


@pytest.fixture
def card(device: str) -> str:
    """The same where it is a real card, whose memory and arithmetic are its own."""
    if device != "cuda" or os.environ.get(SETTING) == "stand-in":
        pytest.skip("needs a real CUDA device: its memory or its kernels are what is tested")
    return device


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose attention differs: grouped heads, soft caps, sinks and windows."""
    from tests.families.models import FAMILIES, save

    wanted = ("Llama", "Qwen3", "Gemma 2", "gpt-oss")
    return {f.name: save(f, tmp_path_factory.mktemp("family")) for f in FAMILIES if f.name in wanted}


def overrides(device: str, *own: str) -> tuple[str, ...]:
    """Settings of a small run on a device."""
    return (*SMALL, f"runtime.device={device}", *own)
