"""What MLflow's own UI shows of a run at first sight, in a real browser: description, links, figures, tags."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tests.support import tiny
from tests.support.runs import run_comparison
from tests.support.serving import Server, mlflow_server
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.server, pytest.mark.browser]


@pytest.fixture
def server(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    started = mlflow_server(tmp_path / "server", f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}")
    started.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    mlflow.set_tracking_uri(started.uri)
    yield started
    started.kill()


def shown(address: str, folder: Path) -> str:
    """The elements of a page of the UI once it has loaded."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here; runs where there is one of {', '.join(names)}")
    command = [
        found, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=30000",
        "--window-size=1280,900", f"--user-data-dir={folder / 'profile'}", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode("utf-8", errors="replace")


def linked(dom: str) -> dict[str, str]:
    """The links of a description, which open in a tab of their own: text -> address."""
    links = re.findall(r'<a target="_blank" href="(#[^"]*)">([^<]*)</a>', dom)
    return {text: address.replace("&amp;", "&") for address, text in links}


def test_first_sight_of_a_comparison_and_of_its_runs(
    server: Server, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run prints leads to its page, and every link of its description to what it names."""
    results = run_comparison("ablate_selector", tiny.config(llama_folder), {"select_modes": "sink_recent,random_span"})
    printed = capsys.readouterr().out
    (address,) = re.findall(rf"^MLflow +({server.uri}/#/\S+)$", printed, re.MULTILINE)
    parent = shown(address, tmp_path)
    links = linked(parent)
    assert list(links) == ["page", "conditions", "comparisons", "summary", "charts", "tables"]
    assert f": {llama_folder.name}<" in parent
    assert ": symbol_lookup<" in parent
    compared = shown(f"{server.uri}/{links['charts']}", tmp_path)
    assert "<strong>2</strong> matching runs" in compared
    assert all(result.label in compared for result in results)
    assert "report.html" in (page := shown(f"{server.uri}/{links['page']}", tmp_path))
    assert 'class="mlflow-html-iframe"' in page
    assert {"accuracy_by_condition.png", "kl_to_teacher_by_condition.png"} <= set(re.findall(r"\w+\.png", page))
    nested = shown(f"{server.uri}/#/experiments/{address.split('/')[5]}/runs/{results[0].run_id}", tmp_path)
    links = linked(nested)
    assert list(links) == ["page", "ON samples", "OFF prompts", "report"]
    assert ": sink_recent<" in nested
    table = shown(f"{server.uri}/{links['ON samples']}", tmp_path)
    assert "View as table" in table
    assert "on-42-00003" in table
    figure = shown(f"{server.uri}/{links['page'].replace('report.html', 'accuracy.png')}", tmp_path)
    assert '<img alt="accuracy.png" src="blob:' in figure
