"""Read runs of an MLflow experiment: parameters, metrics, tags, tables and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cedkv.core.errors import ConfigError
from cedkv.core.text import near_match, preview
from cedkv.runs.connection import Connection, tracking_uri
from cedkv.runs.store import explain


@dataclass(frozen=True)
class StoredRun:
    """A run as MLflow has it; ``start_time`` is in ms since 1970."""

    run_id: str
    status: str
    start_time: int
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


class ExperimentReader:
    """Reads the runs of an experiment, their tables and files."""

    def __init__(self, timeout: int) -> None:
        """Create a reader; ``timeout``: longest wait for a call, in seconds."""
        self._connection = Connection(timeout)

    def runs(self, experiment: str, query: str = "") -> list[StoredRun]:
        """Return the runs that are not deleted, the latest first.

        Args:
            experiment: its name or, only digits, its id.
            query: MLflow's search filter, ``tags.team = 'a'``.

        Raises:
            ConfigError: there is no such experiment, MLflow rejects the filter, or does not answer.
        """
        with self._reported():
            experiments = self._pages(lambda client, token: client.search_experiments(page_token=token))
            by_name = {each.name: each.experiment_id for each in experiments}
            experiment_id = by_name.get(experiment, experiment if experiment in by_name.values() else None)
            if experiment_id is None:
                raise ConfigError(
                    f"there is no experiment {preview(experiment)} at {tracking_uri()}{near_match(experiment, by_name)} "
                    "(MLFLOW_TRACKING_URI, or --tracking-uri, says where to look)"
                )
            found = self._pages(
                lambda client, token: client.search_runs(
                    [experiment_id], query, order_by=["attributes.start_time DESC"], page_token=token
                )
            )
            return [
                StoredRun(
                    run.info.run_id,
                    run.info.status,
                    run.info.start_time or 0,
                    dict(run.data.params),
                    dict(run.data.metrics),
                    dict(run.data.tags),
                )
                for run in found
            ]

    def table(self, run_id: str, name: str) -> list[dict[str, Any]] | None:
        """Return the rows of a table at the run's root; None where the run has none that can be read.

        Raises:
            ConfigError: MLflow does not answer.
        """
        with self._reported(), TemporaryDirectory() as folder:
            artifacts = self._connection.call(lambda client: client.list_artifacts(run_id))
            if name not in {artifact.path for artifact in artifacts}:
                return None
            path = self._connection.call(lambda client: client.download_artifacts(run_id, name, folder))
            try:
                content = json.loads(Path(path).read_text(encoding="utf-8"))
                return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
            except (ValueError, KeyError, TypeError):
                return None

    def files(self, run_id: str, names: Collection[str], folder: Path) -> None:
        """Download files of a run, those that it has of these.

        Args:
            names: paths among the run's artifacts.
            folder: where the files go, under the same paths.

        Raises:
            ConfigError: MLflow has no such run, or does not answer.
        """
        with self._reported():
            for within in sorted({name.rpartition("/")[0] for name in names}):
                for path in self._paths(run_id, within):
                    if path in names:
                        self._download(run_id, path, folder / path)

    def _paths(self, run_id: str, within: str) -> list[str]:
        return [artifact.path for artifact in self._connection.call(lambda client: client.list_artifacts(run_id, within))]

    def _download(self, run_id: str, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = self._connection.call(lambda client: client.download_artifacts(run_id, path, str(target.parent)))
        Path(found).replace(target)  # releases of MLflow differ in whether the path's folders are made again

    def _pages(self, search: Callable[..., Any]) -> list[Any]:
        """Return what a search, given the client and the ``token`` of a page, finds on all pages."""
        found, token = list[Any](), None
        while True:
            page = self._connection.call(partial(search, token=token))
            found += page
            token = page.token
            if not token:
                return found

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn an error of MLflow into ConfigError."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"MLflow at {tracking_uri()}: {explain(error, tracking_uri())}") from None
