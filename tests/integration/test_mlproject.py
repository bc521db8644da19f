"""What ``mlflow run`` reads calls modules and files that exist, and quotes nothing; docs/ lists its options."""

import importlib.util
import re
from pathlib import Path

import yaml

from cedkv.config.options import COMPARISONS, OPTIONS

ROOT = Path(__file__).parents[2]


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


def test_the_pages_list_the_p_names_that_there_are() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `[\w.]+` \| `(\w+)` \|", text, re.MULTILINE)) == set(OPTIONS)
    of_the_run = re.search(r"The run itself has the names (.*?)\. Lists", text, re.DOTALL)
    assert of_the_run is not None
    assert re.findall(r"`([a-z]+)`", of_the_run[1]) == ["config", "set", "phase", "resume", "debug"]
    text = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    for name, lists in COMPARISONS.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)
        assert [found for found in re.findall(r"`(\w+)`", row) if found != "all"] == list(lists)
