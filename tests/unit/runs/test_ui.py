"""Links of a run's description, as MLflow's UI follows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cedkv.core.text import escape_markdown
from cedkv.report.text import links
from cedkv.runs.manifest import RunManifest
from cedkv.runs.ui import how_to_look, logged_length, ui_links

RUN = RunManifest("phase2", "2", experiment_id="7", mlflow_run_id="8da8f583e4b1")
ARTIFACTS = "#/experiments/7/runs/8da8f583e4b1/artifacts"


def test_files_become_addresses_under_any_server() -> None:
    found = ui_links(links({"page": "report.html", "ON samples": "phase2_on_samples.json"}), RUN)
    assert found == f"[page]({ARTIFACTS}/report.html) · [ON samples]({ARTIFACTS}/phase2_on_samples.json)"


def test_nested_runs_are_compared_by_a_link_that_markdown_takes_whole() -> None:
    found = ui_links("[charts](compare:CHART) · [tables](compare:ARTIFACT)", RUN)
    targets = [part.split(")")[0] for part in found.split("](")[1:]]
    assert [target.split("&")[0] for target in targets] == [
        "#/experiments/7/runs?compareRunsMode=CHART",
        "#/experiments/7/runs?compareRunsMode=ARTIFACT",
    ]
    assert all("%278da8f583e4b1%27" in target and not set(target) & set(" `'()<>") for target in targets)


@pytest.mark.parametrize(
    "text", ["[x](https://host/report.html)", "[x](#anchor)", "a](b c)", escape_markdown("[x](report.html)")]
)
def test_other_links_and_text_are_left_alone(text: str) -> None:
    assert ui_links(text, RUN) == text


def test_the_length_of_what_is_logged_is_known_before_the_ids_are() -> None:
    """As long as with the longest ids, not more: what is said below the links is cut to the room that they leave."""
    head = "[page](report.html) · [charts](compare:CHART)"
    longest = RunManifest("phase2", "2", experiment_id="1" * 20, mlflow_run_id="a" * 64)
    assert len(ui_links(head, RUN)) < logged_length(head) == len(ui_links(head, longest))


PAGE = "#/experiments/7/runs/8da8f583e4b1"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:///mlflow.db", "mlflow ui --host 127.0.0.1   (in this folder), then http://127.0.0.1:5000/"),
        ("sqlite:///{here}/mlflow.db", "mlflow ui --host 127.0.0.1   (in this folder), then http://127.0.0.1:5000/"),
        ("sqlite:///runs.db", "mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///{here}/runs.db, then http://127.0.0.1:5000/"),
        ("sqlite:////a b/mlflow.db",
         "mlflow ui --host 127.0.0.1 --backend-store-uri 'sqlite:////a b/mlflow.db', then http://127.0.0.1:5000/"),
        ("file:///a/mlruns", "mlflow ui --host 127.0.0.1 --backend-store-uri file:///a/mlruns, then http://127.0.0.1:5000/"),
        ("postgresql://me:secret@h/db",
         "mlflow ui --host 127.0.0.1 --backend-store-uri postgresql://h/db   (with the credentials of that address), then "
         "http://127.0.0.1:5000/"),
        ("https://me:secret@h:5000/mlflow/", "https://h:5000/mlflow/"),
    ],
)  # fmt: skip
def test_a_ui_is_started_in_this_folder_only_where_it_shows_the_run(
    uri: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI", raising=False)
    assert how_to_look(uri.replace("{here}", str(tmp_path)), RUN) == told.replace("{here}", str(tmp_path)) + PAGE


def test_a_workspace_has_no_page_of_that_kind() -> None:
    assert how_to_look("databricks://me", RUN) == "run 8da8f583e4b1 at databricks://me"
