"""Runs by a configuration, as the command line makes them of a request."""

from __future__ import annotations

from collections.abc import Mapping

from cedkv.analysis.results import ConditionResult, Results
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.runs import pipeline
from cedkv.runs.manifest import RunManifest
from cedkv.runs.resolved import resolve_run


def run_phase2(config: Phase2Config, phase: Phase = "2", resumed: RunManifest | None = None) -> Results:
    """Run, or go on with, one evaluation; its results."""
    return pipeline.run(resolve_run("phase2", config, phase, resumed=resumed))[0].results


def run_comparison(
    name: str, config: Phase2Config, lists: Mapping[str, str | None], resumed: RunManifest | None = None
) -> list[ConditionResult]:
    """Run, or go on with, a comparison; a result per condition."""
    return pipeline.run(resolve_run(name, config, lists=lists, resumed=resumed))
