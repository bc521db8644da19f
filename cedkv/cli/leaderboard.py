"""``cedkv leaderboard``: rank methods over the runs of an MLflow experiment."""

from __future__ import annotations

from pathlib import Path

import click

from cedkv.cli.click_ext import GroupedCommand, report_errors, without_garbage_collection


@click.command("leaderboard", cls=GroupedCommand)
@click.option("--experiment", default="cedkv", show_default=True, metavar="NAME", help="MLflow experiment, by name or id.")
@click.option("--filter", "query", default="", metavar="TEXT", help="MLflow's search filter: \"tags.team = 'a'\".")
@click.option("--tracking-uri", "uri", metavar="URI", help="Where the runs are; by default MLFLOW_TRACKING_URI.")
@click.option("--out", default="leaderboard.html", show_default=True, metavar="FILE", help="Page; a .csv goes beside it.")
@click.option("--timeout", type=click.IntRange(4, 3600), default=60, show_default=True, help="Longest wait per call (s).")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def leaderboard_command(experiment: str, query: str, uri: str | None, out: str, timeout: int, debug: bool) -> None:
    """Rank methods over the tasks and models of an MLflow experiment.

    Finished evaluations count: single runs, and the nested runs of comparisons. One page with a matrix of methods by task and
    model, and the same table as CSV.
    """
    with report_errors(debug):
        with without_garbage_collection():
            from cedkv.runs import connection
            from cedkv.runs.leaderboard import write_leaderboard

        if uri is not None:
            connection.use_tracking_uri(uri)
        write_leaderboard(experiment, query, Path(out), timeout, click.echo)
