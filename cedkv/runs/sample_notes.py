"""What a reader should know about a run's samples, in its journal's header: a report without the model says the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cedkv.tasks.load import Samples, Unusable


def notes_header(samples: Samples, name: str = "samples") -> dict[str, Any]:
    """Return the entries of a header; ``name`` is what their keys begin with."""
    return {
        f"{name}.notes": list(samples.notes),
        f"{name}.unusable": [asdict(left_out) for left_out in samples.unusable],
    }


def read_notes(header: Mapping[str, Any], name: str = "samples") -> tuple[tuple[str, ...], tuple[Unusable, ...]]:
    """Return ``notes`` and ``unusable`` of the samples that a header is of; none in a header of an older run."""
    unusable = (Unusable(**{**entry, "examples": tuple(entry["examples"])}) for entry in header.get(f"{name}.unusable", ()))
    return tuple(header.get(f"{name}.notes", ())), tuple(unusable)
