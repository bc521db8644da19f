"""A package of somebody else's, as docs/extending.md has it: built, installed into a folder, and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cedkv.core.environment import environment_variables
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
SMALL = (
    "runtime.device=cpu,runtime.batch_size=4,eval.on_samples=6,eval.off_samples=8,eval.gate_a_samples=4,eval.n_random_trials=2,"
    "prefix_len=24,select.span_len=4,select.span_budget=3,select.min_span_distance=4,data.pairs=4"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package of the recipe is installed into."""
    package, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert set(files) == {"pyproject.toml", "cedkv_example.py"}
    for name, text in files.items():
        (package / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
               "--disable-pip-version-check", "--target", str(site), str(package)]  # fmt: skip
    subprocess.run(command, check=True, cwd=package)
    return site


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder of its own, with the package installed."""
    environment = {name: value for name, value in environment_variables().items() if not name.startswith("MLFLOW_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)


def evaluated(installed: Path, model: Path, folder: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Folder and run.json of an evaluation with everything that the package brings."""
    done = run(
        installed, folder, "entrypoints.phase2_eval", "--model_id", str(model), "--select_mode", "fading_attention",
        "--positioning_mode", "every_second", "--set", SMALL, "--set", "data.task=number_lookup", *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (output,) = (folder / "outputs").iterdir()
    return output, json.loads((output / "run.json").read_text())


def test_a_package_adds_selector_task_positioning_and_check(installed: Path, llama_folder: Path, tmp_path: Path) -> None:
    """Command line, parameters, tags, page and Gate A know them as they know the built-in ones."""
    output, manifest = evaluated(installed, llama_folder, tmp_path, "--set", "select.params={decay: 0.9}")
    params, tags = manifest["params"], manifest["tags"]
    assert params["phase2.select.mode"] == "fading_attention"
    assert params["phase2.select.params"] == '{"decay": 0.9}'
    assert params["phase2.data.task"] == "number_lookup"
    assert params["phase2.injection.positioning_mode"] == "every_second"
    assert {name: value for name, value in tags.items() if name.startswith("extension.")} == {
        "extension.select.mode": "cedkv-example 0.1",
        "extension.data.task": "cedkv-example 0.1",
        "extension.injection.positioning_mode": "cedkv-example 0.1",
        "extension.gateA.slots_visible": "cedkv-example 0.1",
        "extension.gateB.half_the_teacher": "cedkv-example 0.1",
    }
    assert tags["gateA"] == tags["gateA.slots_visible"] == "pass"
    assert tags["gateB.half_the_teacher"] in ("pass", "fail")
    assert manifest["name"] == "fading_attention · every_second · number_lookup · seed 42"
    page = (output / "report.html").read_text()
    for shown in ("fading_attention", "decay: 0.9", "number_lookup", "every_second", "slots_<wbr>visible"):
        assert shown in page, shown
    selection = json.loads((output / "artifacts" / "phase2_selection.json").read_text())
    for sample in selection["on"]:
        assert sample["sample_id"].startswith("number-42-")
        assert sample["demo_text"].startswith("Number: ")
        assert sample["key_positions"] == [2 * i for i in range(len(sample["kept_tokens"]))]
        assert sample["query_start"] == 2 * len(sample["kept_tokens"])


def test_cached_keys_are_rotated_to_the_new_positions(installed: Path, llama_folder: Path, tmp_path: Path) -> None:
    """Gate A holds a mode that nobody here knew to the model's own keys at its positions."""
    _, manifest = evaluated(installed, llama_folder, tmp_path, "--kv_source", "gather")
    assert manifest["params"]["phase2.select.params"] == '{"decay": 0.99}', "defaults are recorded too"
    assert manifest["tags"]["gateA"] == "pass"
    assert manifest["tags"]["gateA.first_layer"] == "pass"


def test_a_selector_that_asks_for_another_score(installed: Path, llama_folder: Path, tmp_path: Path) -> None:
    """Gate A computes the score again on each sample alone."""
    _, manifest = evaluated(installed, llama_folder, tmp_path, "--select_mode", "small_keys")
    assert manifest["params"]["phase2.select.mode"] == "small_keys"
    assert manifest["tags"]["gateA"] == manifest["tags"]["gateA.attention_alone"] == "pass"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.params={decoy: 0.9}", "FadingAttention has no parameter 'decoy'; did you mean 'decay'?"),
        ("select.params={decay: 0}", "decay must be above 0 and at most 1, not 0"),
        ("select.params={decay: soon}", "select.params.decay: input should be a valid number"),
        ("select.mode=fading_atention", "did you mean 'fading_attention'?"),
        ("data.task=number_lockup", "did you mean 'number_lookup'?"),
    ],
)
def test_what_does_not_fit_is_rejected_before_anything_is_loaded(
    installed: Path, tmp_path: Path, override: str, message: str
) -> None:
    selector = () if override.startswith("select.mode") else ("--select_mode", "fading_attention")
    done = run(installed, tmp_path, "entrypoints.phase2_eval", *selector, "--set", override)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_the_contract_tests_are_usable_by_the_package(installed: Path, tmp_path: Path) -> None:
    program = tmp_path / "contract.py"
    program.write_text(
        "from cedkv.testing import check_selector, check_task\n"
        "check_selector('fading_attention', decay=0.9)\n"
        "check_selector('cedkv_example:FadingAttention')\n"
        "check_selector('small_keys')\n"
        "check_task('number_lookup')\n"
    )
    done = run(installed, tmp_path, "contract")
    assert done.returncode == 0, done.stderr
