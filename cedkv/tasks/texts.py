"""The samples of a run as text: what a configuration's files hold, read once and before any model, and what tasks generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cedkv.config.data import DataBlock
from cedkv.config.extensions import TASKS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.registry import build
from cedkv.core.text import plural, preview
from cedkv.core.values import OnEpisode
from cedkv.tasks import off_prompts
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.columns import Columns, find_columns, sample_ids
from cedkv.tasks.episode_rows import EPISODE_COLUMNS, read_episodes
from cedkv.tasks.from_contexts import context_rows, record_rows
from cedkv.tasks.from_rows import RowTask, picked, shot_rows
from cedkv.tasks.off_rows import read_off
from cedkv.tasks.rows import MAX_ROWS, Row, read_rows

MAX_SEARCH = 100_000
"""How many samples of a generator are made at most to find those of ``data.sample_ids``."""


@dataclass(frozen=True)
class OffText:
    """An OFF prompt as text.

    document: plain text, which stands in no chat template and is cut to ``data.off_length`` tokens. place: where it stands in
    a user's file; empty for others.
    """

    sample_id: str
    text: str
    document: bool = False
    place: str = ""


@dataclass(frozen=True)
class FileEpisodes(Task):
    """The episodes of a user's file."""

    path: str
    read: tuple[OnEpisode, ...]

    @property
    def gives(self) -> frozenset[str]:
        """Return nothing: what all its episodes have goes by the file, and ``lacking`` says."""
        return frozenset()

    def episodes(self, request: TaskRequest) -> tuple[OnEpisode, ...]:
        return self.read

    def source(self, request: TaskRequest) -> str:
        return self.path

    def pick(self, ids: Sequence[str]) -> FileEpisodes:
        """Return the task of these samples, in this order. Raises DataError: there is no such id."""
        known = [episode.sample_id for episode in self.read]
        return replace(self, read=tuple(self.read[i] for i in picked(known, ids, self.path)))

    def lacking(self, field: str, data: DataBlock, seed: int, n: int) -> str | None:
        """Return the id of one of the first ``n`` samples that lacks a field of ``OnEpisode``; None for none."""
        return next((episode.sample_id for episode in self.read[:n] if getattr(episode, field) is None), None)


@dataclass(frozen=True)
class PickedEpisodes(Task):
    """Some episodes of a generator, by their ids."""

    task: Task
    ids: tuple[str, ...]

    @property
    def gives(self) -> frozenset[str]:
        return self.task.gives

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        """Yield the episodes in the order of the ids. Raises DataError: no such id among the first ``MAX_SEARCH``."""
        wanted, found, known = set(self.ids), dict[str, OnEpisode](), list[str]()
        for episode, _ in zip(self.task.episodes(replace(request, n=MAX_SEARCH)), range(MAX_SEARCH), strict=False):
            known.append(episode.sample_id)
            if episode.sample_id in wanted:
                found[episode.sample_id] = episode
            if len(found) == len(wanted):
                break
        else:
            picked(known, self.ids, f"{self.source(request)}, of which {len(known):,} were looked at,")
        yield from (found[sample_id] for sample_id in self.ids)

    def source(self, request: TaskRequest) -> str:
        return self.task.source(request)


@dataclass(frozen=True)
class SampleTexts:
    """The samples of a run as text.

    on: the source of ON episodes: a generator, or a user's file, read. off: OFF prompts. notes: what a reader of the run
    should know about the files, a sentence each. columns: which columns of a file episodes are built from; None where no are.
    on_places: where the ON samples stand in a user's file, by their ids.
    """

    on: Task
    off: tuple[OffText, ...]
    notes: tuple[str, ...] = ()
    columns: Columns | None = None
    on_places: Mapping[str, str] = field(default_factory=dict)


def read_sample_texts(config: Phase2Config) -> SampleTexts:
    """Read the files that a configuration names, and set up the generators in place of those that it does not.

    Raises:
        DataError: a file that cannot be read or used, with the line or row; an id of ``data.sample_ids`` that it does not
            have; or more OFF prompts are asked for than are built in.
    """
    data = config.data
    columns, places, notes = None, dict[str, str](), list[str]()
    if data.on_path is None:
        on: Task = build(TASKS.get(data.task), data.params, "data.params")
    else:
        on, columns, places, notes = read_on(data.on_path, config)
    if data.sample_ids is not None:
        ids = tuple(data.sample_ids)
        repeated = next((name for name in ids if ids.count(name) > 1), None)
        if repeated is not None:
            raise DataError(f"data.sample_ids names {preview(repeated)} twice; leave one of them out")
        on = on.pick(ids) if isinstance(on, FileEpisodes | RowTask) else PickedEpisodes(on, ids)
    off, more = _off(config)
    return SampleTexts(on, tuple(off), (*notes, *more), columns, places)


def read_on(path: str, config: Phase2Config) -> tuple[FileEpisodes | RowTask, Columns | None, dict[str, str], list[str]]:
    """Return the task of a user's file, the columns that it builds episodes from, the place of each id, and notes.

    Raises:
        DataError: the file cannot be read or used.
    """
    data, n = config.data, config.eval.on_samples
    in_order = data.sample_ids is None and data.unusable == "refuse"

    def limit(first: Row) -> int:
        return n if in_order and EPISODE_COLUMNS & first.values.keys() else MAX_ROWS

    rows = read_rows(path, "data.on_path", limit)
    if EPISODE_COLUMNS & rows.rows[0].values.keys():
        episodes = read_episodes(rows.rows)
        places = {episode.sample_id: row.place for episode, row in zip(episodes, rows.rows, strict=True)}
        left_out = [] if data.sample_ids else _left_out(path, "eval.on_samples", n, len(episodes), rows.cut)
        return FileEpisodes(path, tuple(episodes)), None, places, left_out
    columns = find_columns(rows, data.fields, "data.on_path")
    if columns.kind == "records":
        task: tuple[RowTask, list[str]] = record_rows(rows, columns, data, config.seed)
    elif columns.kind != "shots":
        task = context_rows(rows, columns, data, config.seed)
    else:
        shots = None
        if data.shots_from is not None:
            shot_file = read_rows(data.shots_from, "data.shots_from")
            shots = shot_file, find_columns(shot_file, data.fields, "data.shots_from")
        task = shot_rows(rows, columns, shots, data, config.seed)
    left_out = [] if data.sample_ids else _left_out(path, "eval.on_samples", n, len(task[0].ids), rows.cut)
    places = dict(zip(sample_ids(rows, columns)[0], (row.place for row in rows.rows), strict=True))
    return task[0], columns, places, [*left_out, *task[1]]


def shortfalls(config: Phase2Config, on_source: str, n_on: int, n_off: int) -> list[str]:
    """Return notes on what there are fewer of than asked for; samples picked by id are as many as asked for."""
    sizes, ids = config.eval, config.data.sample_ids
    counts = (
        (on_source, "eval.on_samples", min(sizes.on_samples, len(ids or ()) or sizes.on_samples), n_on),
        (config.data.off_path or "the built-in prompts", "eval.off_samples", sizes.off_samples, n_off),
    )
    sample = "usable sample" if config.data.unusable == "skip" else "sample"
    return [
        f"{source} has {plural(found, sample)}, fewer than {key} = {wanted}: all of them are taken"
        for source, key, wanted, found in counts
        if found < wanted
    ]


def _left_out(path: str, key: str, n: int, found: int, cut: bool) -> list[str]:
    """Return the note on a file that has more than ``n`` samples; ``cut``: it goes on behind those that were read."""
    if found >= MAX_ROWS and cut:
        return [f"{path}: only the first {found:,} rows are read"]
    if not cut and found <= n:
        return []
    return [f"{path} has more samples than {key} = {n}{'' if cut else f' (it has {found:,})'}: the others are not used"]


def _off(config: Phase2Config) -> tuple[list[OffText], list[str]]:
    data, n = config.data, config.eval.off_samples
    if data.off_path is not None:
        read, cut, notes = read_off(data.off_path, data, n if data.unusable == "refuse" else MAX_ROWS)
        return [OffText(*prompt) for prompt in read], [*_left_out(data.off_path, "eval.off_samples", n, len(read), cut), *notes]
    try:
        return [OffText(*prompt) for prompt in off_prompts.prompts(n, config.seed)], []
    except ValueError as error:
        raise DataError(f"{error}: lower eval.off_samples (-P max_off) or give more with data.off_path") from None
