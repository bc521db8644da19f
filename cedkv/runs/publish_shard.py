"""What a finished shard leaves: no verdict, but what the run of all shards needs of it besides its journal."""

from __future__ import annotations

import click

from cedkv.analysis.results import collect
from cedkv.core.text import plural
from cedkv.report.artifacts import TokenTexts
from cedkv.report.page.samples import ConditionSamples
from cedkv.report.tables import off_tokens
from cedkv.runs import tracking
from cedkv.runs.journal import Journal
from cedkv.runs.lifecycle import ActiveRun
from cedkv.runs.progress import Clock
from cedkv.runs.publish import seconds_metrics
from cedkv.runs.resolved import ResolvedRun


def publish_shard(resolved: ResolvedRun, active: ActiveRun, texts: TokenTexts, journal: Journal, clock: Clock) -> None:
    """Store the texts of the tokens that the page of the whole run may show, log and end the run, and print how to merge."""
    manifest, shard = active.manifest, resolved.shard
    tokens: set[int] = set()
    for condition in resolved.conditions:
        shown = ConditionSamples()
        collected = collect(journal.records(condition.key), [shown])
        tokens.update(shown.tokens(), off_tokens(collected.off))
    texts.save(active.folder, tokens)
    manifest.seconds = clock.read()
    size = f"{len(journal.ran_on)} of {plural(len(journal.planned), 'unit')}"
    merging = "`python -m cedkv merge RUN RUN ...` makes the run, with its verdict, of all shards."
    manifest.set_results(seconds_metrics(manifest.seconds), {}, f"Shard {shard}: {size}, without a verdict. {merging}")
    why = "a part of a run has no verdict" if journal.ran_on else "there are more shards than units"
    click.echo(f"shard    {shard}: {size}, in {active.folder}; {why}")
    click.echo(
        f"merge    when all shards are done: python -m cedkv merge RUN RUN ... (their folders, or ids in {manifest.home}/)"
    )
    active.finish(manifest)
    if active.fault is None:
        click.echo(f"MLflow   {tracking.where_to_look(manifest)}")
