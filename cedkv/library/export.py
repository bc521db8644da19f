"""A run's tables as files that other programs read: CSV or Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cedkv.library.runs import Run

Format = Literal["csv", "parquet"]


def tables(run: Run) -> dict[str, pd.DataFrame]:
    """Return a run's tables by name, without those that are empty.

    Those of a comparison hold all its conditions, in whose first column ``condition`` is the label.
    """
    if run.comparison is None:
        metrics = pd.DataFrame(list(run.metrics.items()), columns=["metric", "value"])
        found = {"on": run.on, "off": run.off, "selections": run.selections, "metrics": metrics, "checks": run.checks}
    else:
        parts = {label: tables(condition) for label, condition in run.conditions.items()}
        names = dict.fromkeys(name for own in parts.values() for name in own if name != "comparisons")
        found = {
            name: pd.concat(
                [_labelled(label, own[name]) for label, own in parts.items() if name in own], ignore_index=True, sort=False
            )
            for name in names
        }
        found["conditions"] = run.table
    found["comparisons"] = run.comparisons
    return {name: table for name, table in found.items() if len(table)}


def export(run: Run, to: Format, folder: Path) -> list[Path]:
    """Write a run's tables to a folder, a file each; lists and mappings in a cell become JSON.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, table in tables(run).items():
        path, flat = folder / f"{name}.{to}", table.map(_flat)
        if to == "csv":
            flat.to_csv(path, index=False)
        else:
            flat.to_parquet(path, index=False)
        files.append(path)
    return files


def _labelled(label: str, table: pd.DataFrame) -> pd.DataFrame:
    labelled = table.copy()
    labelled.insert(0, "condition", label)
    return labelled


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
