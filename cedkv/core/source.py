"""Digests of the code that results depend on: this package's own, and modules of other packages that a run names."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

CERTIFIED_CODE = ("core", "config", "metrics_phase2.py", "kv", "tasks", "selectors", "models", "inference", "checks")
"""Packages and modules that the certificate's probe computes with; a test asserts that the probe imports no other part."""
RECORDS_CODE = (*CERTIFIED_CODE, "conditions.py", "units.py", "recording.py", "records.py", "eval_phase2.py", "execution")
"""Packages and modules that a run's records are computed with; a test asserts that a worker imports no other part."""


@cache
def code_digest(parts: tuple[str, ...]) -> str:
    """Return the sha256 over the source files of these packages and modules of ``cedkv``."""
    root = Path(__file__).parents[1]
    roots = [root / part for part in parts]
    return _digest(root, (file for r in roots for file in ([r] if r.suffix else r.rglob("*.py"))))


def module_digest(module: str) -> str | None:
    """Return the sha256 over the source file of an imported module; None where it has none, as in a notebook."""
    file = getattr(sys.modules.get(module), "__file__", None)
    path = Path(file) if file else None
    return None if path is None or not path.is_file() else _digest(path.parent, [path])


def _digest(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
