"""Addresses of pages of MLflow's UI, from the server's own address on, so that they work under any. Without mlflow."""

from __future__ import annotations

import os
import re
import shlex
from urllib.parse import quote, urlencode

from cedkv.core.text import redact
from cedkv.runs.manifest import RunManifest
from cedkv.runs.store import database_file

_LINK = re.compile(r"(?<!\\)\]\((?P<compare>compare:)?(?P<target>[\w.-]+)\)", re.ASCII)


def ui_server(uri: str) -> str:
    """Return the address of MLflow's server, or the one at which the UI of a store without one is to be started.

    Args:
        uri: MLflow's tracking URI.
    """
    return redact(uri).rstrip("/") if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"


def how_to_look(uri: str, manifest: RunManifest) -> str:
    """Return how to open a run in MLflow's UI; arguments as ``ui_server``.

    A server has a page for it. A UI that is started in the working folder shows ``mlflow.db`` there; any other store is named.
    """
    page = f"{ui_server(uri)}/{run_page(manifest)}"
    if uri.startswith(("http://", "https://")):
        return page
    if uri.startswith(("databricks", "uc:")):
        return f"run {manifest.mlflow_run_id} at {redact(uri)}"
    command, database = "mlflow ui --host 127.0.0.1", database_file(uri)
    if database is None:
        hidden = "" if redact(uri) == uri else "   (with the credentials of that address)"
        return f"{command} --backend-store-uri {shlex.quote(redact(uri))}{hidden}, then {page}"
    place = os.path.abspath(database)
    if place == os.path.abspath("mlflow.db") and "MLFLOW_BACKEND_STORE_URI" not in os.environ:
        return f"{command}   (in this folder), then {page}"
    return f"{command} --backend-store-uri {shlex.quote(f'sqlite:///{place}')}, then {page}"


def run_page(manifest: RunManifest) -> str:
    """Return the page of a run."""
    return f"#/experiments/{manifest.experiment_id}/runs/{manifest.mlflow_run_id}"


def compare_page(manifest: RunManifest, mode: str) -> str:
    """Return the page that compares the nested runs of a run.

    Runs are sorted by a metric, because the UI hides nested runs below their parent while runs are sorted by time.

    Args:
        mode: ``CHART`` for a bar chart per metric, ``ARTIFACT`` for tables side by side.
    """
    query = {
        "compareRunsMode": mode,
        "searchFilter": f"tags.`mlflow.parentRunId` = '{manifest.mlflow_run_id}'",
        "orderByKey": "metrics.`phase2_rel_kl_to_teacher_select`",
        "orderByAsc": "true",
    }
    return f"#/experiments/{manifest.experiment_id}/runs?{urlencode(query, quote_via=quote)}"


def ui_links(text: str, manifest: RunManifest) -> str:
    """Return a run's description with its links as the UI follows them.

    ``[page](report.html)`` leads to the file at the run's root, ``[charts](compare:CHART)`` to ``compare_page``. They are
    written so until the run is logged, because only MLflow gives the ids that an address is made of.
    """

    def replaced(link: re.Match[str]) -> str:
        if link["compare"]:
            return f"]({compare_page(manifest, link['target'])})"
        return f"]({run_page(manifest)}/artifacts/{link['target']})"

    return _LINK.sub(replaced, text)


def logged_length(text: str) -> int:
    """Return how many characters a description has at most once its links are those of ``ui_links``."""
    return len(ui_links(text, RunManifest("", "", experiment_id="9" * 20, mlflow_run_id="f" * 64)))
