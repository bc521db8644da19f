"""A leaderboard of the runs of an MLflow experiment: which runs count, what their methods, tasks and models are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from cedkv.analysis.leaderboard import Entry, Leaderboard
from cedkv.analysis.ranking import leaderboard
from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.files import write_text
from cedkv.core.text import escape_control, plural, redact
from cedkv.core.values import Record
from cedkv.report.leaderboard import console_matrix, frame
from cedkv.report.page.leaderboard import leaderboard_page
from cedkv.runs import manifest
from cedkv.runs.experiment_reader import ExperimentReader, StoredRun
from cedkv.runs.tags import SHARD
from cedkv.runs.tracking import PARENT, RESUMED
from cedkv.selectors.base import query_kind, selector_class

TABLE = "phase2_on_samples.json"
MODE, PARAMS, PATH, TASK = "phase2.select.mode", "phase2.select.params", "phase2.data.on_path", "phase2.data.task"
MODEL_SETTINGS = (
    *("phase2.model.id", "phase2.model.revision", "phase2.runtime.torch_dtype"),
    *("phase2.model.chat_template", "phase2.model.template_kwargs"),
)
NOT_OF_A_TASK = ("off_path", "off_format", "off_length", "sample_ids", "unusable")
"""Keys of ``data`` that do not make another task: which samples of it are taken, and OFF prompts."""
METHOD_BLOCKS = ("phase2.prefix_len", "phase2.prefix.", "phase2.injection.", "phase2.select.", "phase2.layer_scope.")
NOT_OF_A_METHOD = (MODE, PARAMS, "phase2.select.causal_drop_advisory")
VALUE_ALONE = ("phase2.model.id", PATH, "phase2.runtime.torch_dtype")
"""Settings whose value says by itself what it is."""
NUMBERS = ("correct_base", "correct_teacher", "correct_select", "kl_base_teacher", "kl_select_teacher")
"""Columns of the table that are read; where there are labels, those among labels too."""


@dataclass(frozen=True)
class ExperimentBoard:
    """A leaderboard, and what a reader should know of how it was made, a sentence each."""

    board: Leaderboard
    notes: list[str]


def write_leaderboard(experiment: str, query: str, out: Path, timeout: int, echo: Callable[[str], None]) -> None:
    """Write the leaderboard of an experiment as a page and as CSV beside it, and print the matrix.

    Raises:
        ConfigError: as ``experiment_board``; or the page cannot be written.
    """
    made = experiment_board(experiment, query, timeout)
    page = leaderboard_page(made.board, f"experiment {escape_control(experiment)}", notes=made.notes)
    table = out.with_suffix(".csv")
    try:
        write_text(out, page)
        write_text(table, frame(made.board).to_csv(index=False))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}; give another file with --out") from None
    echo(console_matrix(made.board))
    for note in made.notes:
        echo(f"note     {note}")
    best = made.board.best
    echo(f"best     {'none' if best is None else best.method}\nrule     {made.board.rule}\nfiles    {out}, {table}")


def experiment_board(experiment: str, query: str, timeout: int) -> ExperimentBoard:
    """Return the leaderboard of an experiment's finished evaluations: single runs, and nested runs of comparisons.

    Runs of one model, task and method are pooled where their samples differ (other seeds); where a later run has a sample of an
    earlier one, the earlier run does not count.

    Args:
        query: MLflow's search filter; empty for all runs.
        timeout: longest wait for a call to MLflow, in seconds.

    Raises:
        ConfigError: there is no such experiment, it has no evaluation that counts, or MLflow does not answer.
    """
    reader = ExperimentReader(timeout)
    found = reader.runs(experiment, query)
    left_out: Counter[str] = Counter()
    runs: list[tuple[StoredRun, list[Record]]] = []
    evaluations = []
    for run in found:
        reason = _why_left_out(run)
        if reason is None:
            evaluations.append(run)
        elif reason:
            left_out[reason] += 1
    for run in tqdm(evaluations, desc="reading runs", unit="run", disable=None, dynamic_ncols=True):
        rows = reader.table(run.run_id, TABLE)
        if rows and all(map(_is_sample, rows)):
            runs.append((run, rows))
        else:
            left_out[f"without a readable table {TABLE}"] += 1
    reasons = ", ".join(f"{plural(n, 'run')} {reason}" for reason, n in left_out.items())
    notes = [f"Left out: {reasons}."] if reasons else []
    if not runs:
        filtered = f" that fits the filter {query!r}" if query else ""
        raise ConfigError(
            f"experiment {experiment!r} has no finished evaluation of phase 2{filtered} ({plural(len(found), 'run')}). "
            f"{' '.join(notes) or 'Run one: python -m cedkv --phase 2.'}"
        )
    entries, pooled, superseded = _entries(runs)
    if superseded:
        notes.append(f"{plural(superseded, 'run')} superseded by later ones on the same samples.")
    if pooled:
        notes.append(f"{plural(pooled, 'cell')} pool several runs on different samples; OFF p99 is the largest of theirs.")
    return ExperimentBoard(leaderboard(entries, seed=0), notes)


def _why_left_out(run: StoredRun) -> str | None:
    """Return why a run is no evaluation that counts, None for one that is; empty for a run that holds no results by design."""
    if RESUMED in run.tags or SHARD in run.tags or ("comparison" in run.tags and PARENT not in run.tags):
        return ""
    if MODE not in run.params:
        return "not of cedkv"
    if run.status != "FINISHED":
        return f"not finished ({run.status.lower()})"
    return None if run.tags.get("phase2") in ("pass", "fail") else "of phase 1.5"


def _entries(runs: Sequence[tuple[StoredRun, list[Record]]]) -> tuple[list[Entry], int, int]:
    """Return an entry per model, task and method; how many pool several runs, and how many runs are superseded.

    Args:
        runs: with their samples, the latest first.
    """
    models, tasks, methods = _names([run for run, _ in runs])
    taken: dict[tuple[str, str, str], list[tuple[StoredRun, list[Record]]]] = {}
    superseded = 0
    for i, (run, rows) in enumerate(runs):
        group = taken.setdefault((models[i], tasks[i], methods[i]), [])
        seen = {row["sample_id"] for _, earlier in group for row in earlier}
        if seen.isdisjoint(row["sample_id"] for row in rows):
            group.append((run, rows))
        else:
            superseded += 1
    entries = []
    for (model, task, method), group in sorted(taken.items(), key=lambda item: item[1][0][0].start_time):
        first, _ = group[0]
        role, query = _kind(first)
        p99s = [run.metrics["phase2_off_delta_p99_select"] for run, _ in group if "phase2_off_delta_p99_select" in run.metrics]
        run_ids = tuple(run.run_id for run, _ in group)
        on = [row for _, rows in group for row in rows]
        p99 = max(p99s, default=None)
        entries.append(Entry(model, task, method, role != "candidate", query, run_ids, on, p99, _gain_min(first)))
    return entries, sum(len(group) > 1 for group in taken.values()), superseded


def _kind(run: StoredRun) -> tuple[str, str]:
    """Return role and query-awareness of a run's selector: of its tags, or of the selector where it is installed.

    A selector that is a reference ``package.module:Class`` is not imported: the run may be anyone's.
    """
    if "kind" in run.tags and "query" in run.tags:
        return run.tags["kind"], run.tags["query"]
    if run.params[MODE] not in SELECTORS.names():
        return "candidate", ""
    selector = selector_class(run.params[MODE])
    return selector.role, query_kind(selector)


def _is_sample(row: Record) -> bool:
    """Return whether a row of a table has what is read of a sample."""
    numbers = [row.get(name) for name in NUMBERS] + [row.get(f"kl_{arm}_teacher_labels") for arm in ("base", "select")]
    return isinstance(row.get("sample_id"), str) and all(isinstance(value, int | float | None) for value in numbers)


def _gain_min(run: StoredRun) -> float:
    """Return what the teacher must gain on base in a run."""
    try:
        return float(_settings(run)["phase2.thresholds.on_gain_min"])
    except ValueError:
        return Phase2Config().thresholds.on_gain_min


def _settings(run: StoredRun) -> Mapping[str, str]:
    """Return a run's settings as text; a setting that its version did not have has its default."""
    return _defaults() | run.params


@cache
def _defaults() -> dict[str, str]:
    return manifest.params(Phase2Config())


def _names(runs: Sequence[StoredRun]) -> tuple[list[str], list[str], list[str]]:
    """Return what the model, the task and the method of each run are called."""
    settings = [_settings(run) for run in runs]
    models = [{name: each[name] for name in MODEL_SETTINGS} for each in settings]
    tasks = [
        {
            name: value
            for name, value in each.items()
            if name.startswith("phase2.data.") and name.removeprefix("phase2.data.") not in NOT_OF_A_TASK
        }
        for each in settings
    ]
    model_names = _told_apart([_last_part(each["phase2.model.id"]) for each in settings], models)
    task_names = _told_apart([each[TASK] if each[PATH] == "null" else _last_part(each[PATH]) for each in settings], tasks)
    return model_names, task_names, _method_names(settings)


def _told_apart(names: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names, with those settings in which those of one name differ."""
    of_name: dict[str, list[Mapping[str, str]]] = {}
    for name, each in zip(names, settings, strict=True):
        of_name.setdefault(name, []).append(each)
    differing = {
        name: [key for key in group[0] if any(each[key] != group[0][key] for each in group)] for name, group in of_name.items()
    }
    return [_label(name, {key: each[key] for key in differing[name]}) for name, each in zip(names, settings, strict=True)]


def _method_names(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the selector of each run, with those settings that are not the most common ones of all runs."""
    considered = [
        {name: value for name, value in each.items() if name.startswith(METHOD_BLOCKS) and name not in NOT_OF_A_METHOD}
        | {f"{each[MODE]}.params": each[PARAMS]}  # another selector has other parameters
        for each in settings
    ]
    counts: dict[Hashable, Counter[str]] = {}
    for each in considered:
        for name, value in each.items():
            counts.setdefault(name, Counter())[value] += 1
    common = {name: values.most_common(1)[0][0] for name, values in counts.items()}
    return [
        _label(all_of[MODE].removesuffix("_span"), {name: value for name, value in each.items() if value != common[name]})
        for all_of, each in zip(settings, considered, strict=True)
    ]


def _label(name: str, shown: Mapping[str, str]) -> str:
    parts = [name]
    for key, value in shown.items():
        parts.append(value if key in VALUE_ALONE else f"{key.rsplit('.', 1)[-1].removeprefix('keep_')} {value}")
    return escape_control(redact(" · ".join(parts)))


def _last_part(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or path
