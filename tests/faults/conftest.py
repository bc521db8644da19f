"""What a run leaves that nothing happened to: what every broken one is compared with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cedkv.checks.certificate import ensure_certificate
from cedkv.models.fingerprint import fingerprint
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import config, left_by, the_run
from tests.support.runs import run_phase2


@pytest.fixture(scope="session")
def certified(llama_folder: Path) -> Path:
    """A model that is certified already, so that a run writes nothing but its own files: crashes are planted by counting."""
    _, lm = tiny.load(llama_folder)
    ensure_certificate(lm, fingerprint(lm), None)
    return llama_folder


@pytest.fixture(scope="session")
def undisturbed(certified: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed run, as text."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            points.without_mlflow(patch)
            run_phase2(config(certified), "2")
        return left_by(the_run())
    finally:
        os.chdir(before)
