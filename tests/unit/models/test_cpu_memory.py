"""Freed memory is kept: measured as page faults of a process that frees and takes the same again."""

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from cedkv.models.cpu import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def once():
    caches = [torch.zeros(1 << 20) for _ in range(40)]  # 4 MB each, as a layer's K/V

once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str, **more: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS, what], env={**environment, **more}, capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs Linux with glibc; runs there"
)
def test_what_was_freed_is_taken_again_without_page_faults() -> None:
    left = faults("leave")
    assert faults("keep") < left / 10
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > left / 10  # the user's own setting stays
