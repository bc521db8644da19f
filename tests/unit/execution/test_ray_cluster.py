"""How a cluster is shared out, and what can be said of a configuration before Ray is asked."""

from __future__ import annotations

import re

import pytest

from cedkv.core.errors import ConfigError
from cedkv.execution.ray_cluster import Node, Share, share_out
from cedkv.runs import resolved
from cedkv.runs.resolved import resolve_run
from tests.support import tiny


def shared(nodes: list[Node], *overrides: str) -> Share:
    return share_out(tiny.config("x", "runtime.device=auto", *(f"runtime.{setting}" for setting in overrides)).runtime, nodes)


@pytest.mark.parametrize(
    ("nodes", "overrides", "expected"),
    [
        ([Node(8, 0)], ("workers=2",), Share(2, 4, False)),
        ([Node(8, 0)], ("workers=3",), Share(3, 2, False)),
        ([Node(8, 0), Node(4, 0)], ("workers=3",), Share(3, 4, False)),
        ([Node(8, 0)], ("workers=auto",), Share(8, 1, False)),
        ([Node(8, 0), Node(3, 0)], ("workers=auto", "threads=2"), Share(5, 2, False)),
        ([Node(2, 0)], ("workers=1", "threads=1"), Share(1, 1, False)),
        ([Node(64, 4), Node(32, 4), Node(16, 0)], ("workers=auto",), Share(8, 8, True)),
        ([Node(64, 4)], ("workers=2",), Share(2, 16, True)),
        ([Node(2, 8)], ("workers=auto",), Share(8, 1, True)),
        ([Node(8, 2)], ("workers=2", "device=cpu"), Share(2, 4, False)),
        ([Node(8, 2)], ("workers=2", "device=cuda", "threads=3"), Share(2, 3, True)),
    ],
)
def test_a_cluster_is_shared_out(nodes: list[Node], overrides: tuple[str, ...], expected: Share) -> None:
    assert shared(nodes, *overrides) == expected


@pytest.mark.parametrize(
    ("nodes", "overrides", "message"),
    [
        ([Node(2, 0)], ("workers=3",), "has room for 2 with 1 thread each; lower workers or threads"),
        ([Node(8, 0)], ("workers=3", "threads=4"), "has room for 2 with 4 threads each"),
        ([Node(8, 2)], ("workers=3",), "2 cards has room for 2 with a card each; lower workers"),
        ([Node(8, 0)], ("workers=2", "device=cuda"), "none of the cluster's 1 machine offers Ray a card"),
        ([Node(0, 0)], ("workers=auto",), "has room for 0"),
    ],
)
def test_what_has_no_room_is_rejected(nodes: list[Node], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        shared(nodes, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("runtime.ray_address=auto",), "runtime.workers = null asks for none"),
        (("runtime.workers=2", "runtime.device=auto", "runtime.device_map=auto"), "each of runtime.workers = 2 has one card"),
        (("runtime.workers=2", "runtime.device=cuda:1"), "get theirs from Ray"),
        (("runtime.workers=2", "runtime.device=mps"), "get theirs from Ray"),
        (("runtime.workers=0",), "runtime.workers"),
        (("runtime.workers=many",), "runtime.workers"),
        (("runtime.workers=2", "runtime.ray_address=somewhere"), "runtime.ray_address"),
        (("runtime.threads=0",), "runtime.threads"),
    ],
)
def test_settings_that_contradict_each_other(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny.config("x", *overrides)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head:6379", "ray://head:10001", "[::1]:6379"])
def test_addresses(address: str) -> None:
    assert tiny.config("x", "runtime.workers=auto", f"runtime.ray_address='{address}'").runtime.ray_address == address


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is looked for: there is none of that name."""
    monkeypatch.setattr(resolved, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^runtime\.workers = 2 needs Ray, .*pip install 'cedkv\[ray\]'"):
        resolve_run("phase2", tiny.config("nowhere", "runtime.workers=2"))
