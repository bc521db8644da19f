"""From a resolved run to its workload: the model without its weights, and the samples as tokens."""

from __future__ import annotations

import click

from cedkv.conditions import by_task
from cedkv.core.text import sanitize
from cedkv.execution.workload import TaskGroup, Workload
from cedkv.inference.context_window import check_context, load_fitting
from cedkv.inference.head_weights import check_held_out
from cedkv.inference.passes import check_readings
from cedkv.models.capabilities import check_supported
from cedkv.models.opening import ModelSpec
from cedkv.report.text import about_samples
from cedkv.runs.resolved import ResolvedRun, RunInputs
from cedkv.units import fixed_size, longest_prompt


def prepare(run: RunInputs | ResolvedRun, spec: ModelSpec) -> Workload:
    """Make a run's samples for its opened model, and reject what is known to fail before weights are loaded.

    Raises:
        ModelError, ConfigError, DataError: the model does not support the run, or samples cannot be used.
    """
    config, conditions = run.config, run.conditions
    for condition in conditions:
        check_supported(spec.capabilities, condition.config)
    check_readings(spec, [condition.config for condition in conditions])
    groups = []
    for task, group in by_task(conditions).items():
        configs = [condition.config for condition in group]
        samples = load_fitting(spec, configs, run.phase, run.texts[task])
        for line in about_samples(samples.notes, samples.unusable, len(samples.on), len(samples.off)):
            click.echo(": ".join(filter(None, ("samples", task, sanitize(line)))), err=True)
        check_context(spec, configs, samples, run.phase)
        check_held_out(spec, configs)
        longest = longest_prompt(group, samples, run.phase)
        groups.append(TaskGroup(task, group, samples, fixed_size(group, len(samples.on), len(samples.off), longest)))
    return Workload(config, groups, run.phase)
