"""``cedkv list``, shell completion, and the comparisons as commands of the main program."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from cedkv.checks.base import CHECKS
from cedkv.cli import app
from cedkv.cli.listing import KINDS
from cedkv.config.extensions import REGISTRIES, SELECTORS, TASKS
from cedkv.config.options import COMPARISONS
from cedkv.core.environment import environment_variables
from cedkv.core.registry import Registry
from cedkv.selectors.base import Selector
from entrypoints import ablate_selector, compare_positioning
from tests.support.waiting import PATIENCE


def listed(kind: str) -> list[dict[str, Any]]:
    found = CliRunner().invoke(app.main, ["list", kind, "--json"])
    assert found.exit_code == 0, found.output
    rows: list[dict[str, Any]] = json.loads(found.output)
    return rows


@pytest.mark.parametrize(("kind", "registry"), [("selectors", SELECTORS), ("tasks", TASKS), ("checks", CHECKS)])
def test_every_registered_name_is_listed_with_what_it_is(kind: str, registry: Registry[Any]) -> None:
    rows = listed(kind)
    assert [row["name"] for row in rows] == registry.names()
    assert {row["provider"] for row in rows} == {"cedkv"}
    for row in rows:
        assert len(row["summary"]) > 15, row
        assert not row["summary"].startswith(("Selector(", "Task(")), "a dataclass's own docstring"
        assert "``" not in row["summary"]
        assert "\n" not in row["summary"]


def test_a_selector_is_listed_with_its_role_and_parameters() -> None:
    rows = {row["name"]: row for row in listed("selectors")}
    assert rows["oracle_span"]["role"] == "oracle"
    assert (rows["random_span"]["role"], rows["random_span"]["query"]) == ("reference", "query-agnostic")
    assert rows["attention_diversity_span"]["query"] == "query-aware"
    assert rows["replay"]["parameters"] == {"min_lead": 0.0, "plus": False}


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_one_line_each_in_columns(kind: str) -> None:
    rows, columns = listed(kind), KINDS[kind][1]
    lines = CliRunner().invoke(app.main, ["list", kind]).output.splitlines()
    assert len(lines) == len(rows)
    width = max(len(row[columns[0]]) for row in rows)
    for line, row in zip(lines, rows, strict=True):
        assert line[:width].rstrip() == row[columns[0]]
        assert line.endswith(row[columns[-1]])


def test_models_are_the_families_that_were_judged() -> None:
    rows = {row["family"]: row for row in listed("models")}
    assert (rows["Llama"]["model_type"], rows["Llama"]["verdict"]) == ("llama", "works")
    assert rows["BLOOM"]["verdict"] == "rejected"
    assert "ALiBi" in rows["BLOOM"]["remarks"]


def test_a_selector_of_another_package_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Selector):
        """Spans of my own. And more about them."""

    monkeypatch.setitem(SELECTORS._registered, "own_span", Own)
    row = listed("selectors")[-1]
    assert (row["name"], row["provider"], row["summary"]) == ("own_span", __name__, "Spans of my own")


def test_what_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS._entry_points, "broken", EntryPoint("broken", "no_such_module:Task", TASKS.group))
    found = CliRunner().invoke(app.main, ["list", "tasks"])
    assert found.exit_code == 2
    assert found.output.startswith("Error: task 'broken' cannot be imported from no_such_module:Task")


def test_comparisons_are_the_entry_points_commands() -> None:
    for entry, name in ((ablate_selector, "ablate-selector"), (compare_positioning, "compare-positioning")):
        command = app.main.commands[name]
        assert [parameter.opts for parameter in command.params] == [parameter.opts for parameter in entry.main.params]
        assert command.help == entry.main.help
    assert {name.replace("_", "-") for name in COMPARISONS} <= set(app.main.commands)


def completed(arguments: list[str], incomplete: str) -> list[str]:
    found = ShellComplete(app.main, {}, "cedkv", "_CEDKV_COMPLETE").get_completions(arguments, incomplete)
    return [item.value for item in found]


@pytest.mark.parametrize(
    ("arguments", "incomplete", "expected"),
    [
        (["--phase2-select-mode"], "tra", ["transfer_span"]),
        (["ablate-selector", "--select_modes"], "tra", ["transfer_span"]),
        (["ablate-selector", "--select_modes"], "tova,random_span,snap", ["tova,random_span,snapkv"]),
        (["compare-positioning", "--kv_sources"], "", ["prefill", "gather"]),
        (["ablate-selector", "--task"], "symbol_l", ["symbol_lookup"]),
        (["list"], "", list(KINDS)),
        (["completion"], "z", ["zsh"]),
        ([], "compare", ["compare-positioning"]),
    ],
)
def test_names_are_completed(arguments: list[str], incomplete: str, expected: list[str]) -> None:
    assert completed(arguments, incomplete) == expected


def test_every_option_that_takes_a_registered_name_completes_it() -> None:
    for name, lists in COMPARISONS.items():
        for option, (key, _) in lists.items():
            if key in REGISTRIES:
                assert completed([name.replace("_", "-"), f"--{option}"], "") == REGISTRIES[key].names()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_calls_the_installed_command(shell: str) -> None:
    found = CliRunner().invoke(app.main, ["completion", shell])
    assert found.exit_code == 0
    assert f"_CEDKV_COMPLETE={shell}_complete" in found.output


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ([], {"_CEDKV_COMPLETE": "bash_complete", "COMP_WORDS": "cedkv --phase2-select-mode tra", "COMP_CWORD": "2"}),
        (["list", "selectors"], {}),
        (["list", "tasks"], {}),
        (["list", "models"], {}),
    ],
    ids=["completion", "selectors", "tasks", "models"],
)
def test_no_torch_is_loaded_for_a_name(arguments: list[str], variables: dict[str, str]) -> None:
    """A key press must not cost the seconds of an import."""
    program = f"from cedkv.cli.app import main\nmain({arguments!r}, 'cedkv')"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env={**environment_variables(), **variables, "PYTHONPATH": str(Path(app.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0
    assert len(done.stdout) > 15
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "click" in imported
    assert not {"torch", "transformers", "mlflow"} & imported
