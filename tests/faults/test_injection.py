"""Values that try to get out: of the shell of ``mlflow run``, of a run's folder, of the markdown of a description."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mlflow
import pytest
import yaml

from cedkv.config.options import COMPARISONS, OPTIONS
from cedkv.core.errors import ConfigError
from cedkv.core.text import escape_markdown, redact
from cedkv.runs.lifecycle import sync
from cedkv.runs.manifest import RunManifest, load_manifest
from tests.support import tiny

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "$(touch pwned)", "; touch pwned", "`touch pwned`", "a\ntouch pwned", "'; touch pwned; '", '"; touch pwned; "',
    "| touch pwned", "&& touch pwned", "> pwned", "$HOME", "{config}", "%s", "\\", "-x", "*", "~", "# x", "!!",
    "' \" \\ $ `", "é 🦙",
)  # fmt: skip
ENTRIES = {
    name: sorted({"set", "resume", "debug", *entry["parameters"], *OPTIONS, *COMPARISONS.get(name, ())})
    for name, entry in yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"].items()
}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_no_value_of_a_parameter_reaches_the_shell(
    name: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``mlflow run`` starts is a real shell with a ``python`` that notes its arguments: every value of every parameter
    arrives to the letter."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(tmp_path / 'noted')!r}, 'w').write(json.dumps(sys.argv))\n"
    )
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    for shift in range(3):
        given = {option: HOSTILE[(at + 7 * shift) % len(HOSTILE)] for at, option in enumerate(ENTRIES[name])}
        mlflow.projects.run(str(ROOT), name, parameters=given, env_manager="local", experiment_name="cedkv", synchronous=True)
        _, *arguments = json.loads((tmp_path / "noted").read_text())
        assert arguments[:2] == ["-m", f"entrypoints.{name}"]
        assert dict(zip(arguments[2::2], arguments[3::2], strict=True)) == {
            f"--{option}": value for option, value in given.items()
        }
    assert not [path for folder in (tmp_path, ROOT) for path in folder.rglob("pwned")]


def a_run(folder: Path) -> RunManifest:
    entry = RunManifest("phase2", "2", "n", run_id="a", home=folder)
    entry.write(tiny.config("x"))
    return entry


@pytest.mark.parametrize(
    "changed",
    [{"children": {"x": "../../etc"}}, {"children": {"x": "/etc"}}, {"children": ["x"]}, {"tags": 3}, {"metrics": {"x": "y"}},
     {"run_id": "../a"}, {"datasets": "x"}, {"status": None}],
)  # fmt: skip
def test_a_foreign_run_json_is_rejected_by_name(tmp_path: Path, changed: dict[str, object]) -> None:
    """It says which other folders are read and logged: they lie next to it, and nowhere else."""
    entry = a_run(tmp_path)
    path = entry.folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ConfigError, match=r"run\.json|holds run"):
        load_manifest(entry.folder)


def test_links_in_a_run_folder_are_not_followed(store: str, tmp_path: Path) -> None:
    """A folder that somebody sent must not log what lies outside of it."""
    (tmp_path / "outside").write_text("private")
    entry = a_run(tmp_path / "outputs")
    (entry.folder / "link.txt").symlink_to(tmp_path / "outside")
    sync(entry.folder, 10, lambda _: None)
    logged = str(load_manifest(entry.folder).mlflow_run_id)
    assert {item.path for item in mlflow.MlflowClient().list_artifacts(logged)} == {"config.yaml"}


def test_markdown_has_no_markup_of_others() -> None:
    hostile = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) `a` **b** | c\n# d"
    text = escape_markdown(hostile)
    assert "\n" not in text
    for mark in "<>[]`*|":
        assert text.count(mark) == text.count(f"\\{mark}") == hostile.count(mark)


def test_no_secret_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever quotes an address, a header or a variable."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55word!")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "S3_SECRET_KEY", "PGPASSWORD", "MLFLOW_CRYPTO_KEK_PASSPHRASE",
             "AZURE_STORAGE_CONNECTION_STRING")  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, f"pa55 of {name}")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsely")
    found = redact(
        "http://u:pa55@h/x https://u:p/a55@h Bearer pa55.x Authorization: Basic pa55== x?sig=pa55&y=1 "
        f"{'hf_' + 'pa55' * 9} pa55word! {' '.join(os.environ[name] for name in names)} falsely http://h:5000/a/b Basic ideas"
    )
    assert "pa55" not in found
    assert found.endswith("falsely http://h:5000/a/b Basic ideas")


def test_yaml_is_read_by_safe_loaders_only() -> None:
    for path in (*ROOT.glob("cedkv/**/*.py"), *ROOT.glob("entrypoints/*.py")):
        for line in path.read_text().splitlines():
            if "yaml.load(" in line:
                assert "Loader=_Loader)  # noqa: S506  (a SafeLoader)" in line, (path, line)
            assert "torch.load(" not in line, path
            assert "import pickle" not in line, path


def test_servers_in_all_examples_are_on_this_machine_only() -> None:
    """``mlflow ui`` and ``mlflow server`` in anything that can be copied from here name the loopback interface."""
    for path in (ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("cedkv/**/*.py"), *ROOT.glob("docs/*.md")):
        text = path.read_text()
        assert "0.0.0.0" not in text, path.name
        for line in text.splitlines():
            if "mlflow ui" in line or "mlflow server " in line:
                assert "--host 127.0.0.1" in line, (path.name, line)
