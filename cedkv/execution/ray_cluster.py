"""A Ray cluster: one that another process has started, by its address, or one on this machine that lasts as long as the run."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cedkv.config.schema import RuntimeBlock
from cedkv.core.errors import ConfigError
from cedkv.core.text import one_line, plural
from cedkv.core.threads import usable_cpus

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_enable_metrics_collection": "0",
}
"""Environment of Ray: no statistics are sent or collected, nothing is announced on the console. What the user has set stays."""
OBJECT_STORE = 100 * 2**20
"""Bytes of shared memory of a cluster on this machine: samples and records pass through it, weights never do."""


@dataclass(frozen=True)
class Node:
    """What a machine of a cluster has."""

    cpus: int
    cards: int


@dataclass(frozen=True)
class Share:
    """How a cluster is shared out: the number of workers, and what each of them has.

    threads: torch threads. card: whether a worker has a card; its threads are then not reserved, because they mostly wait.
    """

    workers: int
    threads: int
    card: bool

    @property
    def resources(self) -> dict[str, int]:
        """Options of a Ray actor; nothing is left to Ray's defaults."""
        return {"num_cpus": 0, "num_gpus": 1} if self.card else {"num_cpus": self.threads, "num_gpus": 0}

    def __str__(self) -> str:
        return f"{plural(self.workers, 'worker')} with {'a card and ' * self.card}{plural(self.threads, 'thread')} each"


def share_out(runtime: RuntimeBlock, nodes: Sequence[Node]) -> Share:
    """Return the workers that a configuration asks for on these machines.

    Workers have cards where there are any, unless ``runtime.device`` is cpu. ``auto`` is one per card; without cards one per
    ``runtime.threads`` CPUs (null: one). Threads that are not set are as many as each worker has CPUs for, the same everywhere,
    because their number changes roundings.

    Raises:
        ConfigError: the cluster has no room for that many workers, or no cards, and ``runtime.device`` is cuda.
    """
    card = runtime.device != "cpu" and any(node.cards for node in nodes)
    if runtime.device == "cuda" and not card:
        raise ConfigError(
            f"runtime.device = cuda, and none of the cluster's {plural(len(nodes), 'machine')} offers Ray a card; use "
            "device=cpu or auto, or start Ray there with --num-gpus"
        )

    def room(threads: int) -> int:
        return sum(node.cards if card else node.cpus // threads for node in nodes)

    workers = room(runtime.threads or 1) if runtime.workers == "auto" else int(runtime.workers or 1)
    if runtime.threads is not None:
        threads = runtime.threads
    elif card:
        threads = max(1, min(node.cpus // node.cards for node in nodes if node.cards))
    else:
        most = max(node.cpus for node in nodes)
        threads = next((threads for threads in range(most, 1, -1) if room(threads) >= workers), 1)
    if not 1 <= workers <= room(threads):
        have = f"{sum(node.cards for node in nodes)} cards" if card else f"{sum(node.cpus for node in nodes)} CPUs"
        raise ConfigError(
            f"runtime.workers = {runtime.workers}: the cluster of {plural(len(nodes), 'machine')} and {have} has room for "
            f"{room(threads)} with {'a card' if card else plural(threads, 'thread')} each; lower workers"
            + ("" if card else " or threads")
        )
    return Share(workers, threads, card)


class Cluster:
    """A connection to a Ray cluster.

    ray: the module. local: the cluster is this run's own. remote: the connection is Ray Client's, and this process no part of
    the cluster.
    """

    def __init__(self, runtime: RuntimeBlock) -> None:
        """Connect, or start a cluster where no address is given and this process is not connected to one.

        Raises:
            ConfigError: there is no cluster at the address, it is of another version, or none can be started here.
        """
        address = runtime.ray_address
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if address is None and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # Ray would write a token into the user's home, and clusters that are started later would ask for it
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
        self.ray: Any = ray
        connected = ray.is_initialized()
        if connected and address is not None:
            raise ConfigError(
                f"runtime.ray_address = {address}: this process is connected to Ray already; leave ray_address out to use that "
                "connection, or end it (ray.shutdown())"
            )
        self.local, self._ours = address is None and not connected, not connected
        self.remote = (address or "").startswith("ray://")
        self._folder = _new_folder() if self.local else None
        if not connected:
            try:
                with _signals_kept(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._connect(address, runtime)
            except BaseException as error:
                self.close()
                if not isinstance(error, Exception):
                    raise
                reason = one_line(error)
                where = "a Ray cluster cannot be started here" if address is None else f"no Ray cluster answers at {address}"
                raise ConfigError(
                    f"{where}: {type(error).__name__}: {reason}. Check runtime.ray_address, that Ray and Python have the same "
                    "versions there, and, if that cluster asks for a token, that RAY_AUTH_MODE=token is set here; or leave "
                    "runtime.workers out to compute in this process"
                ) from error

    def _connect(self, address: str | None, runtime: RuntimeBlock) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is not None:
            _check_reachable(address)
            self.ray.init(address=address, **quiet)
            return
        workers = runtime.workers if isinstance(runtime.workers, int) else 1
        self.ray.init(
            address="local",
            num_cpus=max(usable_cpus(), workers * (runtime.threads or 1)),  # more workers than CPUs are the user's choice
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            _temp_dir=self._folder,
            **quiet,
        )

    @property
    def nodes(self) -> list[Node]:
        """The machines that are up."""
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [Node(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in resources]

    def close(self) -> None:
        """End the connection; a cluster of this run's own ends with all its processes and files."""
        if self._ours:
            self.ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _new_folder() -> str:
    """Make a folder for a cluster's sockets and logs; the path of a socket has at most 107 characters, Ray's own part 70."""
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="cedkv-", dir=root if len(root) <= 20 else "/tmp")  # noqa: S108  (Ray's own default)


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at an address: Ray itself would try for minutes, and print each time."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Give SIGTERM its handler back, which ends a run: connecting to Ray replaces it. Only the main thread has handlers."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGTERM, handler)
