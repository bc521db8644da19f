"""What is wrong with the Python environment that the program was started in: told where an import fails.

This module is imported before anything that needs an installed package or a recent Python, so that it runs where those are
missing: it is plain, Python 3.8 reads it, and it looks at what is installed only once an import has failed.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = (3, 11)
"""The oldest Python that the package runs on, as ``requires-python`` says."""
MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
"""What a required distribution is imported as, where that is not its own name."""


@contextmanager
def explained_imports() -> Iterator[None]:
    """Import in the block what the program is made of; where the environment cannot do that, say so and exit with code 2."""
    try:
        if sys.version_info[:2] < PYTHON:
            raise ImportError("an old Python")
        yield
    except ImportError as error:
        message = explain_import(error)
        if message is None:
            raise
        sys.stderr.write(f"Error: {message}\n")
        sys.exit(2)


def explain_import(error: ImportError) -> str | None:
    """Return what an import that failed says of this Python environment, and the remedy.

    Returns:
        None where the environment is not to blame: code of this package, or of no installed distribution, is at fault.
    """
    from re import findall

    here = f"{sys.executable} (Python {'.'.join(map(str, sys.version_info[:3]))})"
    oldest = ".".join(map(str, PYTHON))
    if sys.version_info[:2] < PYTHON:
        return f"{here} is too old: cedkv needs Python {oldest} or newer. {_remedy('python' + oldest)}"
    lacking = unmet_requirements()
    named = set(findall(r"[\w-]+", f"{error.name} {error}".lower()))
    if any({name, MODULES.get(name, name)} & named for name in lacking):
        return (
            f"{here} cannot run cedkv: of the packages that it needs, {len(lacking)} {'is' if len(lacking) == 1 else 'are'} "
            f"missing or too old: {', '.join(lacking.values())}. {_remedy(sys.executable)}"
        )
    return _broken_package(error, here)


def unmet_requirements() -> dict[str, str]:
    """Return the distributions that the package needs and this environment does not have: name -> what is needed, and there."""
    from importlib.metadata import PackageNotFoundError, version
    from re import match

    unmet = {}
    for requirement in _requirements():
        found = match(r"[\w.-]+", requirement)
        name = found.group().lower() if found else requirement
        try:
            installed = version(name)
        except PackageNotFoundError:
            unmet[name] = f"{requirement} (missing)"
        else:
            if not _allows(requirement, installed):
                unmet[name] = f"{requirement} ({installed} is installed)"
    return unmet


def _requirements() -> list[str]:
    """Return the package's requirements without those of extras: of the checkout that runs, or of the installed package."""
    from importlib.metadata import PackageNotFoundError, requires

    root = _checkout()
    if root is not None:
        import tomllib
        from pathlib import Path

        project: dict[str, list[str]] = tomllib.loads(Path(root, "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["dependencies"]
    try:
        return [requirement for requirement in requires("cedkv") or [] if "extra ==" not in requirement]
    except PackageNotFoundError:
        return []


def _checkout() -> str | None:
    """Return the folder of the checkout that this file is part of; None for an installed package."""
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    return str(root) if (root / "pyproject.toml").is_file() and (root / "MLproject").is_file() else None


def _allows(requirement: str, installed: str) -> bool:
    """Return whether a version is one that a requirement allows; True where ``packaging`` is missing too."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(installed, prereleases=True)


def _remedy(python: str) -> str:
    """Return what to do about an environment that lacks something."""
    from os import path

    root = _checkout()
    own = path.join(root or "", ".venv", "bin", "activate")
    activate = f" (source {own})" if root and path.isfile(own) else ""
    return (
        "`mlflow run --env-manager local` and `python -m` take the first python of the PATH: activate the environment that "
        f"cedkv is installed in{activate}, or install it: {python} -m pip install "
        + (f"-e {root}" if root else "--upgrade cedkv")
    )


def _broken_package(error: ImportError, here: str) -> str | None:
    """Return the message for an installed distribution that cannot be imported; None where none is at fault."""
    from importlib.metadata import packages_distributions, version

    module = _module_at_fault(error)
    names = packages_distributions().get(module, []) if module not in ("cedkv", "entrypoints") else []
    if not names:
        return None
    said = " ".join(str(error).split())
    return (
        f"{names[0]} {version(names[0])}, which is installed in {here}, cannot be imported: {said}. Its installation is not "
        f"complete, or does not fit the other packages: see {sys.executable} -m pip check, and install {names[0]} again"
    )


def _module_at_fault(error: ImportError) -> str:
    """Return the top-level module whose code failed: the innermost one that is not Python's own import system."""
    names = []
    at: TracebackType | None = error.__traceback__
    while at is not None:
        names.append(str(at.tb_frame.f_globals.get("__name__")).partition(".")[0])
        at = at.tb_next
    return next((name for name in reversed(names) if name not in ("importlib", "contextlib")), "")
