"""A run on different kinds of device: what each computed, and how far two of them differ on the same unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from cedkv.core.files import write_json
from cedkv.core.text import number, plural
from cedkv.core.values import Record
from cedkv.execution.worker import Executor
from cedkv.execution.workload import Workload
from cedkv.models.fingerprint import DEVICE_KIND
from cedkv.runs.journal import Journal
from cedkv.runs.manifest import RunManifest

DEVICES = "devices.json"
_KL = ("kl_", "phase2_delta_", "further_kl")
"""How the names of KLs in records begin."""
Records = Mapping[str, Sequence[Record]]


def compare_devices(
    executor: Executor, work: Workload, journal: Journal, numerical_floor: float | None, manifests: Iterable[RunManifest]
) -> None:
    """Measure how far the kinds of device of a finished run differ, and say it in each run: ``devices.json`` and tags.

    The smallest unit is computed on every kind that the executor has, and its records are compared. A kind that only an earlier
    process had is compared if that unit is its own.

    Args:
        numerical_floor: of the certificate, in nats: what two computations on one device differ by.
        manifests: of the run and its nested runs; nothing is written where all units ran on one kind.
    """
    units = _units_by_kind(journal)
    if len(units) < 2:
        return
    common = min(work.own, key=lambda planned: planned.size)
    keys = [condition.key for condition in work.groups[common.group].conditions]
    own = {key: list(journal.records_of(common.key, key)) for key in keys}
    computed: dict[str, Records] = {kind_of(journal.ran_on[common.key]): own}
    for finished in executor.on_every_kind(common):
        computed.setdefault(kind_of(finished.ran_on), finished.records)
    pairs = [{"kinds": pair, **largest_differences(computed[pair[0]], computed[pair[1]])} for pair in combinations(computed, 2)]
    content = {"common_unit": common.key, "not_compared": sorted(units.keys() - computed.keys()), "differences": pairs}
    _store(units, {**content, "numerical_floor": numerical_floor}, manifests)


def join_devices(
    journal: Journal, shards: Sequence[Mapping[str, Any]], numerical_floor: float | None, manifests: Iterable[RunManifest]
) -> None:
    """Say in a run that was merged what its shards have measured, as ``compare_devices`` does; nothing is computed.

    Args:
        journal: of the merged run.
        shards: the content of ``devices.json`` of those shards that have one.
    """
    units = _units_by_kind(journal)
    if len(units) < 2:
        return
    pairs = [pair for content in shards for pair in content["differences"]]
    compared = {kind for pair in pairs for kind in pair["kinds"]}
    common = ", ".join(dict.fromkeys(content["common_unit"] for content in shards)) or None
    content = {"common_unit": common, "not_compared": sorted(units.keys() - compared), "differences": pairs}
    _store(units, {**content, "numerical_floor": numerical_floor}, manifests)


def _units_by_kind(journal: Journal) -> Counter[str]:
    return Counter(map(kind_of, journal.ran_on.values()))


def _store(units: Mapping[str, int], content: Mapping[str, Any], manifests: Iterable[RunManifest]) -> None:
    tags = {"devices": "; ".join(f"{kind} ({plural(n, 'unit')})" for kind, n in sorted(units.items()))}
    pairs = content["differences"]
    if pairs:
        largest = {name: max(pair[name] for pair in pairs) for name in ("kl", "logprob")}
        tags["device_floor"] = ", ".join(f"{name} {number(value, 3)}" for name, value in largest.items())
    for manifest in manifests:
        manifest.tags |= tags
        write_json(manifest.folder / "artifacts" / DEVICES, {"units": dict(units), **content})


def kind_of(ran_on: Mapping[str, Any]) -> str:
    """Return a kind of device, as ``cuda NVIDIA H100``, from what a unit says it ran on."""
    return " ".join(str(ran_on[name]) for name in DEVICE_KIND)


def largest_differences(one: Records, other: Records) -> dict[str, Any]:
    """Return how far two computations of the same unit differ.

    Returns:
        ``kl``, ``logprob``: the largest difference of a KL in nats, and of a log-probability. ``tokens``, ``selections``:
        records whose greedy tokens, or kept tokens, are others.
    """
    found: dict[str, Any] = {"kl": 0.0, "logprob": 0.0, "tokens": 0, "selections": 0}
    for key, records in one.items():
        for left, right in zip(records, other[key], strict=True):
            if left["type"] == "selection":
                found["selections"] += left["kept_tokens"] != right["kept_tokens"]
            elif left["type"] == "sample":
                found["tokens"] += any(left[name] != right[name] for name in left if name.startswith("token_"))
                for name, value in left.items():
                    quantity = "kl" if name.startswith(_KL) else "logprob" if "logprob" in name else None
                    if quantity is not None:
                        differences = [abs(a - b) for a, b in zip(_numbers(value), _numbers(right[name]), strict=False)]
                        found[quantity] = max([found[quantity], *differences])
    return found


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of a field: one, or a list of them, however deep."""
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif value is not None:
        yield float(value)
