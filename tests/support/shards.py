"""Runs in shards, merged and undivided ones, and what of them must be the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result

from cedkv.cli.app import main
from cedkv.config.schema import Phase2Config
from cedkv.runs import pipeline
from cedkv.runs.manifest import load_manifest
from cedkv.runs.merge import merge
from cedkv.runs.outputs import OUTPUTS
from cedkv.runs.resolved import resolve_run
from tests.support import patch_points as points
from tests.support.crashing import left_by

LISTS = {"tasks": "symbol_lookup,other_lookup", "select_modes": "attention_diversity_span,fitted_heads"}
SIZES = ("runtime.batch_size=2", "eval.lds_masks=0", "eval.gate_a_samples=2", "eval.n_random_trials=1")
"""Three units of two ON samples each."""


def run_it(command: str, config: Phase2Config, lists: Mapping[str, str | None] | None = None) -> str:
    """Run; the id of the run."""
    resolved = resolve_run(command, config, lists=lists)
    results = pipeline.run(resolved)
    assert bool(results) == (config.shard is None)
    return resolved.manifest.run_id


def shard_of(config: Phase2Config, name: str) -> Phase2Config:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"shard": name})})


def run_shards(config: Phase2Config, n: int, command: str = "phase2", lists: Any = None) -> list[str]:
    return [run_it(command, shard_of(config, f"{i + 1}/{n}"), lists) for i in range(n)]


def merged(run_ids: list[str]) -> str:
    """Merge with a model out of reach; the id of the run."""
    before = set(OUTPUTS.iterdir())
    real = points.LOAD_MODEL.real
    points.LOAD_MODEL.replace(lambda *_: pytest.fail("a model was loaded"))
    try:
        merge(run_ids)
    finally:
        points.LOAD_MODEL.replace(real)
    (made,) = (folder for folder in set(OUTPUTS.iterdir()) - before if load_manifest(folder).parent is None)
    return made.name


def everything_of(run_id: str) -> dict[str, str]:
    """All files of a run and of its nested runs that are results, without ids and times."""
    ids = {run_id: "RUN"} | {child: f"RUN{i}" for i, child in enumerate(load_manifest(OUTPUTS / run_id).children.values())}
    found = {f"{name}/{path}": text for run, name in ids.items() for path, text in left_by(run).items()}
    for path, text in found.items():
        for run, name in ids.items():
            text = text.replace(run, name)
        found[path] = re.sub(r'"(\w+_)?id": "file:[^"]*"', '"id": ""', text)
    return found


def logged(run_id: str) -> tuple[Any, ...]:
    """What MLflow has of a run, without ids and times."""
    run = mlflow.get_run(run_id)
    metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("seconds_")}
    assert metrics or run.data.params["phase2.runtime.shard"] != "null"
    own = ("mlflow.", "cedkv.origin", "merged_from", "best.run_id", "best.symbol_lookup.run_id", "best.other_lookup.run_id")
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith(own)}
    datasets = {(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs}
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)}
    return run.info.status, run.info.run_name, metrics, run.data.params, tags, datasets, files


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))
