"""Addresses of pages of MLflow's UI, from the server's own address on, so that they work under any. Without mlflow."""

from __future__ import annotations

import re
from urllib.parse import quote, urlencode

from cedkv.runs.manifest import RunManifest

_LINK = re.compile(r"(?<!\\)\]\((?P<compare>compare:)?(?P<target>[\w.-]+)\)", re.ASCII)


def run_page(manifest: RunManifest) -> str:
    """Return the page of a run."""
    return f"#/experiments/{manifest.experiment}/runs/{manifest.mlflow_run_id}"


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
    return f"#/experiments/{manifest.experiment}/runs?{urlencode(query, quote_via=quote)}"


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
    return len(ui_links(text, RunManifest("", "", experiment="9" * 20, mlflow_run_id="f" * 64)))
