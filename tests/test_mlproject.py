"""What ``mlflow run`` reads: every entry point calls a module that exists, with a file that exists, and quotes nothing."""

import importlib.util
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_mlproject_calls_modules_that_exist() -> None:
    """MLflow quotes values for the shell by itself: quotes around ``{config}`` would open a shell injection."""
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert (ROOT / project["conda_env"]).is_file()
    assert set(project["entry_points"]) == {"phase2_eval", "ablate_selector", "compare_positioning"}
    for entry in project["entry_points"].values():
        match = re.fullmatch(r"python -m (entrypoints\.\w+) --config \{config\}", entry["command"])
        assert match is not None
        assert importlib.util.find_spec(match[1]) is not None
        assert (ROOT / entry["parameters"]["config"]["default"]).is_file()
