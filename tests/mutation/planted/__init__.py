"""Faults to plant into the real code: each is a function that changes one thing, until the test's ``monkeypatch`` undoes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


def wrap(patch: Patch, module: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace ``module.name`` by ``change(real, *its arguments)``."""
    real = getattr(module, name)
    patch.setattr(module, name, lambda *given, **named: change(real, *given, **named))
