"""Faults to plant into the real code: each is a function that changes one thing, until the test's ``monkeypatch`` undoes it.

What they change is named in ``tests/support/patch_points.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
