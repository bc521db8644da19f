"""Runs whose workers meet with accidents: a selector that ends its process, and a module that makes a machine another one.

The modules are written into a folder and imported from there, by this process and by every worker, as a user's extension is.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_DYING = '''
"""A selector that is attention_diversity_span, but for what the files beside it say."""
import os, signal
from dataclasses import dataclass
from pathlib import Path
from cedkv.config.extensions import SELECTORS
from cedkv.core.errors import NumericsError
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan

FOLDER = Path(__file__).parent

def take(name):
    """Take a file away; True for the one process that gets it."""
    try:
        os.rename(FOLDER / name, FOLDER / f"{name}.{os.getpid()}")
    except FileNotFoundError:
        return False
    return True

@SELECTORS.register("dying")
@dataclass(frozen=True)
class Dying(AttentionDiversitySpan):
    def choose(self, task):
        with (FOLDER / "calls").open("a") as file:
            file.write("x")
        late = (FOLDER / "calls").stat().st_size > 8
        if take("once") or (late and (FOLDER / "always").exists()):
            os.kill(os.getpid(), signal.SIGKILL)
        if late and (FOLDER / "raise").exists():
            raise RuntimeError("planted")
        if late and (FOLDER / "reject").exists():
            raise NumericsError("sample on-7: planted")
        return super().choose(task)
'''
_KINDS = '''
"""Every other process that imports this is on another kind of machine, whose KLs are a little larger."""
from cedkv.execution import worker
from cedkv.models import cpu
from dying import take

if take("another"):
    cpu.processor = lambda: "x86_64 OTHER"
    real = worker.Worker.compute

    def compute(self, planned, step):
        finished = real(self, planned, step)
        for records in finished.records.values():
            for record in records:
                if record.get("kind") == "on":
                    record["kl_select_teacher"] += 0.25
        return finished

    worker.Worker.compute = compute
'''


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the modules, which this process has imported."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "dying.py").write_text(_DYING)
    (folder / "kinds.py").write_text(_KINDS)
    sys.path.append(str(folder))
    importlib.import_module("dying")
    yield folder
    sys.path.remove(str(folder))


def arm(folder: Path, *names: str) -> None:
    """Let accidents happen: ``once`` a process dies, ``always`` from the ninth selection on; ``raise``, ``reject`` likewise."""
    for path in folder.iterdir():
        if not path.suffix and path.is_file():
            path.unlink()
    for name in names:
        (folder / name).touch()


def another_module(name: str) -> ModuleType:
    """A module that only this process has."""
    module = ModuleType(name)
    sys.modules[name] = module
    return module
