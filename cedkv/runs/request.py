"""What a command line asks for. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cedkv.config.options import Phase


@dataclass(frozen=True)
class RunRequest:
    """A configuration to run, or a run to go on with (which then must agree with the rest).

    command: ``phase2``, the name of a comparison, or ``any``, which goes on with any run.
    path, overrides, options: of ``config.resolve.resolve``.
    phase: None for the default, or for that of the run to go on with.
    lists: list options of a comparison -> comma-separated values.
    resume: id of the run to go on with.
    """

    command: str
    path: str | None = None
    overrides: Sequence[str] = ()
    options: Mapping[str, str | None] = field(default_factory=dict)
    phase: Phase | None = None
    lists: Mapping[str, str | None] = field(default_factory=dict)
    resume: str | None = None
