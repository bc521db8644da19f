"""The samples of a run as text: what a configuration's files hold, read once and before any model, and what tasks generate."""

from __future__ import annotations

from dataclasses import dataclass

from cedkv.config.extensions import TASKS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.registry import build
from cedkv.core.values import OnEpisode
from cedkv.tasks import jsonl, off_prompts
from cedkv.tasks.base import Task, TaskRequest


@dataclass(frozen=True)
class OffText:
    """An OFF prompt as text.

    document: plain text, which stands in no chat template and is cut to ``data.off_length`` tokens.
    """

    sample_id: str
    text: str
    document: bool = False


@dataclass(frozen=True)
class FileEpisodes(Task):
    """The episodes of a user's file."""

    path: str
    read: tuple[OnEpisode, ...]

    def episodes(self, request: TaskRequest) -> tuple[OnEpisode, ...]:
        return self.read

    def source(self, request: TaskRequest) -> str:
        return self.path


@dataclass(frozen=True)
class SampleTexts:
    """The samples of a run as text.

    on: the source of ON episodes: a generator, or a user's file, read. off: OFF prompts.
    """

    on: Task
    off: tuple[OffText, ...]


def read_sample_texts(config: Phase2Config) -> SampleTexts:
    """Read the files that a configuration names, and set up the generators in place of those that it does not.

    Raises:
        DataError: as ``jsonl.read_on``; or more OFF prompts are asked for than are built in.
    """
    data, sizes = config.data, config.eval
    on: Task
    if data.on_path is None:
        on = build(TASKS.get(data.task), data.params, "data.params")
    else:
        on = FileEpisodes(data.on_path, tuple(jsonl.read_on(data.on_path, sizes.on_samples)))
    if data.off_path is not None:
        return SampleTexts(on, tuple(OffText(*line) for line in jsonl.read_off(data.off_path, sizes.off_samples)))
    try:
        prompts = off_prompts.prompts(sizes.off_samples, config.seed)
    except ValueError as error:
        raise DataError(f"{error}: lower eval.off_samples (-P max_off) or give more with data.off_path") from None
    return SampleTexts(on, tuple(OffText(*prompt) for prompt in prompts))
