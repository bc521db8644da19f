"""Evaluate, compare, and read runs: a finished run as DataFrames, from its folder or from MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from cedkv.config.options import COMPARISONS, Phase
from cedkv.config.resolve import from_values, resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.text import near_match, preview
from cedkv.core.values import Record
from cedkv.library.settings import ConfigLike, configuration, keys_of
from cedkv.report.artifacts import SELECTION
from cedkv.runs.manifest import is_run_id
from cedkv.runs.outputs import outputs_folder
from cedkv.runs.resolved import resolve_run

REPORT, COMPARISON, METRICS = "report_phase2.json", "comparison.json", "metrics.jsonl"
MLFLOW_TIMEOUT = 60
"""Longest wait for a call to MLflow, in seconds."""
FILES = (REPORT, COMPARISON, METRICS, f"artifacts/{SELECTION}")
"""What a run is read from; of these a comparison has ``comparison.json``, its conditions and single evaluations the others."""


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run.

    Attributes:
        run_id: its id; ``outputs/RUN_ID`` and, where it was logged, MLflow's.
        report: the content of ``report_phase2.json``, or of a comparison's ``comparison.json``.
        samples: the records of ``metrics.jsonl``, ON samples and OFF prompts; none of a comparison.
        selected: what was selected for each ON sample, of ``phase2_selection.json``; none of a comparison.
        read_condition: reads a condition of a comparison by its run id.
    """

    run_id: str
    report: Mapping[str, Any]
    samples: Sequence[Record]
    selected: Sequence[Record]
    read_condition: Callable[[str], Run]

    def __repr__(self) -> str:
        if self.comparison is not None:
            return f"<comparison {self.comparison} of {len(self.report['conditions'])} conditions, run {self.run_id}>"
        verdicts = ", ".join(f"{name} {word}" for name, word in self.verdicts.items())
        return f"<run {self.run_id}: {self.report['select_mode']}, {verdicts}>"

    @property
    def comparison(self) -> str | None:
        """The comparison's name; None for a single evaluation, or a condition."""
        name = self.report.get("comparison")
        return None if name is None else str(name)

    @cached_property
    def config(self) -> Phase2Config:
        """The resolved configuration; of a comparison, what its conditions share.

        Raises:
            ConfigError: it names what is not registered in this process, a selector of another program for example; import
                what registers it first. Everything else of a run can be read without.
        """
        return from_values(self.report["config"])

    @cached_property
    def on(self) -> pd.DataFrame:
        """One row per ON sample, with the columns of ``records.OnRecord``."""
        return _frame(record for record in self.samples if record["kind"] == "on")

    @cached_property
    def off(self) -> pd.DataFrame:
        """One row per OFF prompt, with the columns of ``records.OffRecord``."""
        return _frame(record for record in self.samples if record["kind"] == "off")

    @cached_property
    def selections(self) -> pd.DataFrame:
        """One row per ON sample: what was kept for it, with the columns of ``records.SelectionRecord``."""
        return _frame(self.selected)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metric name -> value; None for one that could not be computed. None of a comparison."""
        return dict(self.report.get("metrics", {}))

    @property
    def verdicts(self) -> dict[str, str]:
        """``gateA``, ``gateB`` and ``phase2`` -> ``pass`` or ``fail``. None of a comparison."""
        return dict(self.report.get("verdicts", {}))

    @cached_property
    def checks(self) -> pd.DataFrame:
        """One row per check of both gates: name, observed value, limit, verdict. Empty for a comparison."""
        return pd.DataFrame(self.report.get("gates", []))

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Paired differences: between arms of a single evaluation, between conditions of a comparison."""
        return pd.DataFrame(self.report["comparisons"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per condition of a comparison, group by group; empty for a single evaluation."""
        return pd.DataFrame(self.report.get("conditions", []))

    @cached_property
    def conditions(self) -> dict[str, Run]:
        """Label -> the nested run of each condition of a comparison; empty for a single evaluation."""
        rows = self.report.get("conditions", [])
        return {row["condition"]: self.read_condition(row["run_id"]) for row in rows}


def evaluate(config: ConfigLike = None, *, phase: Phase = "2", **settings: Any) -> Run:
    """Evaluate a configuration: the run that ``python -m cedkv`` makes, in MLflow and in ``outputs/``.

    Args:
        config: path of a YAML file, or a configuration; None for the defaults.
        phase: 1.5 is Gate A alone, 2 is everything.
        settings: any configuration key by its short name (``max_on=16``) or in full (``**{"eval.gate_a_samples": 4}``).

    Returns:
        The finished run, read from its folder.

    Raises:
        CedkvError: as ``cedkv.run``; what was computed until then is kept in the run's folder.
    """
    from cedkv.runs.pipeline import run  # imports mlflow, which reading a folder does without

    resolved = resolve_run("phase2", _whole(configuration(config, keys_of(settings, "evaluate"))), phase)
    run(resolved)
    return read_run(resolved.manifest.folder)


def compare(name: str = "ablate_selector", config: ConfigLike = None, **settings: Any) -> Run:
    """Evaluate several conditions on the same samples and compare them: a parent run and a nested run each.

    Args:
        name: ``ablate_selector`` or ``compare_positioning``.
        config: path of a YAML file, or a configuration; None for the defaults.
        settings: the comparison's lists (``select_modes=["snapkv", "tova"]``, ``span_budgets=[2, 4]``), whose product the
            conditions are, and settings that all conditions share, as of ``evaluate``.

    Returns:
        The finished comparison, read from its folder; its ``conditions`` are the nested runs.

    Raises:
        CedkvError: as ``cedkv.run``; what was computed until then is kept in the run's folder.
    """
    from cedkv.runs.pipeline import run

    if name not in COMPARISONS:
        raise ConfigError(f"no comparison is named {preview(name)}{near_match(name, COMPARISONS)}")
    lists = {option: _listed(option, settings.pop(option)) for option in COMPARISONS[name] if option in settings}
    resolved = resolve_run(name, _whole(configuration(config, keys_of(settings, f"compare ({name})"))), lists=lists)
    run(resolved)
    return read_run(resolved.manifest.folder)


def _whole(config: Phase2Config) -> Phase2Config:
    """Return the configuration if it is of a whole run."""
    if config.shard is not None:
        raise ConfigError(
            f"runtime.shard = {config.shard} makes a part of a run, which has no results to return: cedkv.run and the command "
            "line make it, python -m cedkv merge the run of all its shards; leave it out here"
        )
    return config


def _listed(option: str, values: Any) -> str | None:
    """Return the values of a list option as the command line writes them."""
    if values is None or isinstance(values, str):
        return values
    if not isinstance(values, Iterable):
        raise ConfigError(f"{option} = {preview(values)} is no list; give its values in one: {option}=[{values!r}]")
    return ",".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


def read_run(source: str | os.PathLike[str]) -> Run:
    """Read a finished run.

    Args:
        source: its folder, or its run id: that of a folder in ``outputs/``, or else one that MLflow has
            (``MLFLOW_TRACKING_URI``), whose files are then downloaded.

    Raises:
        ConfigError: there is no such run, neither here nor in MLflow, or it is not finished; or MLflow does not answer.
        DataError: one of its files is damaged.
    """
    folder = Path(source)
    if not os.path.isdir(folder) and is_run_id(str(source)):
        folder = outputs_folder() / str(source)
    if os.path.isdir(folder):  # unlike Path.is_dir, False for a name no folder can have
        folder = Path(os.path.abspath(folder))  # the folder's name, also of ".", is the run id
        return _read(folder, lambda run_id: _read(folder.parent / run_id, _no_condition))
    if not is_run_id(str(source)):
        raise ConfigError(
            f"{preview(str(source), 200)} is neither the folder of a run nor a run id; runs are in {outputs_folder()}/"
        )
    return _download(str(source))


def _download(run_id: str) -> Run:
    from cedkv.runs.experiment_reader import ExperimentReader

    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / run_id
        folder.mkdir()
        try:
            ExperimentReader(MLFLOW_TIMEOUT).files(run_id, FILES, folder)
        except ConfigError as error:
            raise ConfigError(
                f"run {run_id} is neither in {outputs_folder()}/ nor can it be had from MLflow: {error}; check the id, or set "
                "MLFLOW_TRACKING_URI"
            ) from None
        return _read(folder, _download)


def _no_condition(run_id: str) -> Run:
    raise ConfigError(f"run {run_id} is asked for as a condition of a condition; conditions have none")


def _read(folder: Path, read_condition: Callable[[str], Run]) -> Run:
    """Read a run whose files are in a folder."""
    report = next((folder / name for name in (COMPARISON, REPORT) if (folder / name).is_file()), None)
    shard = None if report is not None or not (folder / "config.yaml").is_file() else resolve(folder / "config.yaml").shard
    if shard is not None:
        raise ConfigError(
            f"run {folder.name} is shard {shard}, a part of a run without results of its own: python -m cedkv merge makes the "
            "run of all its shards"
        )
    if report is None:
        raise ConfigError(
            f"{preview(str(folder), 200)} has no {REPORT}: it is no run, or one that is not finished; --resume {folder.name} "
            "finishes it"
        )
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        samples, selected = [], []
        if report.name == REPORT:
            lines = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
            samples = [line for line in lines if line["type"] == "sample"]
            selected = json.loads((folder / "artifacts" / SELECTION).read_text(encoding="utf-8"))["on"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{preview(str(folder), 200)}: a file of the run cannot be read: {type(error).__name__}: {error}; it was damaged"
        ) from None
    return Run(folder.name, content, samples, selected, read_condition)


def _frame(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    bookkeeping = ("schema_version", "type", "kind")
    return pd.DataFrame([{name: value for name, value in record.items() if name not in bookkeeping} for record in records])
