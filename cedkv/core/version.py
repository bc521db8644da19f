"""The version of this package, in one place: runs, certificates and journals name it."""

from __future__ import annotations

__version__ = "0.2.0"
