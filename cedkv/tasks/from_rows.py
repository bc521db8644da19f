"""Episodes from rows of solved examples: each row is asked about once, under a demonstration of other rows.

    input,output            Q: Wolves lose again           x data.shots, then the query    Q: Oil prices fall
    Oil prices fall,Biz     A: Sports                                                      A:                  (answer: Biz)

Rows are asked about in an order drawn from the seed, because a file is often sorted by its labels. What a row's episode is
depends on the file, the seed and the row alone, not on how many are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from cedkv.config.data import DataBlock
from cedkv.core.errors import DataError
from cedkv.core.seeding import rng_for
from cedkv.core.text import near_match, plural, preview
from cedkv.core.values import OnEpisode
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.columns import Columns, answer_of, as_text, sample_ids
from cedkv.tasks.rows import Row, Rows
from cedkv.tasks.shots import Question, Shot, ShotTemplate, episode_of, shots_that_fit, template_for
from cedkv.tasks.symbol_lookup import SYMBOLS
from cedkv.tasks.words import read_words, symbols_for

if TYPE_CHECKING:
    from numpy.random import Generator

TEMPLATE = "Q: {input}\nA: {output}\n\n"
MAX_LABELS = 50
"""Most different outputs that are read as a set of labels, where each occurs twice on average or a verbalizer says so."""


@dataclass(frozen=True)
class RowTask(Task):
    """Episodes made of a file's rows.

    ids: the sample id of every row. order: the rows that are asked about, in that order.
    """

    path: str
    ids: tuple[str, ...]
    order: tuple[int, ...]

    @property
    def gives(self) -> frozenset[str]:
        """Return nothing: what all its episodes have goes by the rows, and ``lacking`` says."""
        return frozenset()

    def source(self, request: TaskRequest) -> str:
        return f"{self.path} ({len(self.ids)} rows, seed={request.seed})"

    def pick(self, ids: Sequence[str]) -> RowTask:
        """Return the task of these samples, in this order. Raises DataError: there is no such id."""
        return replace(self, order=picked(self.ids, ids, self.path))

    def lacking(self, field: str, data: DataBlock, seed: int, n: int) -> str | None:
        """Return the id of one of the first ``n`` samples whose episode lacks a field of ``OnEpisode``; None for none."""
        raise NotImplementedError


def picked(known: Sequence[str], ids: Sequence[str], source: str) -> tuple[int, ...]:
    """Return where ids stand among the known ones.

    Raises:
        DataError: an id that is not known, with the nearest one.
    """
    place = {name: i for i, name in enumerate(known)}
    unknown = [name for name in ids if name not in place]
    if unknown:
        named = ", ".join(preview(name, 60) for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        near = near_match(unknown[0], known[:5000]) if len(known) > 12 else f"; there are {', '.join(known)}"
        near = near if len(near) < 300 else f"; ids are like {preview(known[0], 60)}"
        raise DataError(f"data.sample_ids: {source} has no sample {named}{near}")
    return tuple(place[name] for name in ids)


def query_order(n: int, seed: int) -> tuple[int, ...]:
    """Return the order in which the rows of a file are asked about."""
    return tuple(map(int, rng_for(seed, "rows", 0, "").permutation(n)))


@dataclass(frozen=True)
class Example:
    """A row: its input, its output as the file has it, and the choices that it has of its own."""

    input: str
    output: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShotRows(RowTask):
    """Episodes of rows that are solved examples.

    examples: the rows that are asked about. pool: the rows that shots are drawn from; None for the same rows.
    labels: the outputs to choose among; None where they are no set of labels.
    words: output -> the word it is written as.
    """

    examples: tuple[Example, ...]
    pool: tuple[Example, ...] | None
    labels: tuple[str, ...] | None
    words: Mapping[str, str]

    def source(self, request: TaskRequest) -> str:
        data = request.data
        settings = [f"shots={data.shots}" if data.demo_tokens is None else f"demo_tokens={data.demo_tokens}"]
        settings += [f"shots_from={data.shots_from}"] if data.shots_from is not None else []
        return f"{self.path} ({len(self.examples)} rows, {', '.join(settings)}, seed={request.seed})"

    @property
    def repeated_by(self) -> Literal["query"]:
        """Return that a row asks once: another one with the same input has another demo, and base answers it alike."""
        return "query"

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        template = template_for(request, TEMPLATE)
        symbols = self._symbols(request, template) if request.data.verbalizer == "symbols" else ()
        return (self._episode(row, request, template, symbols) for row in self.order)

    def lacking(self, field: str, data: DataBlock, seed: int, n: int) -> str | None:
        if field == "gold" and data.demo_tokens is None:  # else it takes the tokenizer to know which shots fit
            for row in self.order[:n]:
                if self.examples[row].output not in [shot.output for shot in self._shots(row, data, seed)[: data.shots]]:
                    return self.ids[row]
        if field == "other_query_text":
            return next((self.ids[row] for row in self.order[:n] if self._other(row, seed) is None), None)
        return None

    def _episode(self, row: int, request: TaskRequest, template: ShotTemplate, symbols: Sequence[str]) -> OnEpisode:
        data, seed, asked = request.data, request.seed, self.examples[row]
        words = self._drawn_words(self.ids[row], seed, symbols) if symbols else self.words
        drawn = self._shots(row, data, seed)
        shots = [Shot(shot.input, words.get(shot.output, shot.output)) for shot in drawn]
        if data.demo_tokens is not None:
            shots = shots_that_fit(shots, data.demo_tokens, template, request.tokenizer)
        if _balanced(data):
            shots = [shots[i] for i in rng_for(seed, "shot_order", 0, self.ids[row]).permutation(len(shots))]
        answer = words.get(asked.output, asked.output)
        labels = asked.choices or self.labels
        question = Question(
            asked.input,
            answer,
            max((i for i, shot in enumerate(shots) if shot.output == answer), default=None),
            self._other(row, seed),
            None if labels is None else tuple(dict.fromkeys(words.get(label, label) for label in labels)),
        )
        return episode_of(self.ids[row], shots, question, template)

    def _shots(self, row: int, data: DataBlock, seed: int) -> list[Example]:
        """Return shots for a row, the first to be taken first: as many as asked for, or as could fit a number of tokens.

        Raises:
            DataError: there is no other row.
        """
        asked, rng = self.examples[row], rng_for(seed, "shots", 0, self.ids[row])
        want = data.shots if data.demo_tokens is None else data.demo_tokens
        if _balanced(data):
            names = [list(self._by_label)[i] for i in rng.permutation(len(self._by_label))]
            if data.verbalizer == "symbols":  # a symbol that no shot shows has no answer
                names.sort(key=lambda name: name != asked.output)
            rounds = zip_longest(*(_drawn(self._by_label[name], asked, rng) for name in names))
            drawn: Iterator[Example] = (example for each in rounds for example in each if example is not None)
        else:
            drawn = _drawn(self.pool or self.examples, asked, rng)
        shots = [example for example, _ in zip(drawn, range(want), strict=False)]
        if not shots:
            raise DataError(
                f"{data.shots_from or self.path}: no row is left to be a shot for sample {self.ids[row]}: a demonstration is "
                "made of rows with other inputs; give more rows, or a file of them with data.shots_from"
            )
        return shots

    @cached_property
    def _by_label(self) -> dict[str, list[Example]]:
        by_label: dict[str, list[Example]] = {}
        for example in self.pool or self.examples:
            by_label.setdefault(example.output, []).append(example)
        return by_label

    def _other(self, row: int, seed: int) -> str | None:
        """Return the input of another row; None where all are the same."""
        asked = self.examples[row].input
        start = int(rng_for(seed, "other", 0, self.ids[row]).integers(len(self.examples)))
        others = (self.examples[(start + i) % len(self.examples)].input for i in range(len(self.examples)))
        return next((other for other in others if other != asked), None)

    def _symbols(self, request: TaskRequest, template: ShotTemplate) -> tuple[str, ...]:
        """Return the symbols that labels can be written as. Raises DataError: there are too few."""
        labels = self.labels or ()
        spelt = {label.lower() for label in labels}
        words = [word for word in dict.fromkeys((*SYMBOLS, *read_words("words"))) if word not in spelt]
        need = f"data.verbalizer = symbols: {self.path} has {plural(len(labels), 'label')}"
        return symbols_for(request, template, words, len(labels), need, "write words with data.verbalizer={LABEL: WORD, ...}")

    def _drawn_words(self, sample_id: str, seed: int, symbols: Sequence[str]) -> dict[str, str]:
        order = rng_for(seed, "symbols", 0, sample_id).permutation(len(symbols))
        return {label: symbols[i] for label, i in zip(self.labels or (), order, strict=False)}


def _drawn(examples: Sequence[Example], asked: Example, rng: Generator) -> Iterator[Example]:
    """Return examples in a random order, without those that ask the same."""
    return (examples[i] for i in rng.permutation(len(examples)) if examples[i].input != asked.input)


def _balanced(data: DataBlock) -> bool:
    """Return whether labels take turns: also where symbols are drawn for them, each of which a demonstration must show."""
    return data.balance or data.verbalizer == "symbols"


def read_examples(rows: Rows, columns: Columns, skip: bool) -> tuple[list[int], list[Example], list[str]]:
    """Return which rows have both input and output, their examples, and notes on those left out.

    Raises:
        DataError: a row without one of them, unless such rows are to be skipped; or none is left.
    """
    kept, examples, empty = list[int](), list[Example](), list[Row]()
    for i, row in enumerate(rows.rows):
        asked = as_text(row.values.get(columns.input), row.place, columns.input)
        more = as_text(row.values.get(columns.more_input), row.place, columns.more_input) if columns.more_input else None
        answer, choices = answer_of(row, columns)
        if asked is None or answer is None:
            empty.append(row)
            continue
        kept.append(i)
        examples.append(Example(asked if more is None else f"{asked}\n{more}", answer, choices))
    return kept, examples, empty_rows(rows, empty, f"{columns.input} or {columns.output}", skip)


def empty_rows(rows: Rows, empty: Sequence[Row], what: str, skip: bool) -> list[str]:
    """Return the note on rows that were left out because something in them is empty. Raises DataError unless ``skip``."""
    if not empty:
        return []
    said = f"{empty[0].place}: {what} is empty" + (f", as in {plural(len(empty) - 1, 'more row')}" if len(empty) > 1 else "")
    if len(empty) == len(rows.rows):
        raise DataError(f"{said}: no row is left; name other columns with data.fields")
    if not skip:
        raise DataError(f"{said}; fill it in, or leave such rows out with data.unusable=skip")
    return [f"{rows.path}: {plural(len(empty), 'row')} left out: {said}"]


def shot_rows(
    rows: Rows, columns: Columns, shots: tuple[Rows, Columns] | None, data: DataBlock, seed: int
) -> tuple[ShotRows, list[str]]:
    """Return the task of rows that are solved examples, and notes on them.

    Args:
        shots: the rows of ``data.shots_from`` and their columns.

    Raises:
        DataError: rows without input or output, a repeated id, labels and verbalizer that do not fit.
    """
    skip = data.unusable == "skip"
    ids, id_note = sample_ids(rows, columns)
    kept, examples, notes = read_examples(rows, columns, skip)
    pool = None
    if shots is not None:
        _, pool, more = read_examples(*shots, skip)
        notes += more
    everything = [*examples, *(pool or ())]
    words = dict(enumerate_words(rows, columns)) if data.verbalizer is None else {}
    if isinstance(data.verbalizer, dict):
        words = data.verbalizer
    outputs = Counter(example.output for example in everything)
    labels = _labels(outputs, words)
    if words:
        _check_words(outputs, words, rows.path, columns.output)
    if data.verbalizer == "symbols" and labels is None:
        raise DataError(
            f"data.verbalizer = symbols: {rows.path} has no set of labels: column {columns.output} has {len(outputs):,} "
            f"different values in {len(everything):,} rows, where {MAX_LABELS} are the most and each should occur twice; leave "
            "the verbalizer out"
        )
    task = ShotRows(
        rows.path, tuple(ids[i] for i in kept), query_order(len(kept), seed), tuple(examples),
        None if pool is None else tuple(pool), labels, words,
    )  # fmt: skip
    return task, [*([id_note] if id_note else []), *notes]


def enumerate_words(rows: Rows, columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield the words that a file itself has for its integer labels."""
    return ((str(i), word) for i, word in enumerate(rows.words.get(columns.output, ())))


def _labels(outputs: Mapping[str, int], words: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the outputs as a set of labels, in order; None where they are none."""
    if words:
        return tuple(words)
    few = 2 <= len(outputs) <= MAX_LABELS and sum(outputs.values()) >= 2 * len(outputs)
    return tuple(sorted(outputs)) if few else None


def _check_words(outputs: Mapping[str, int], words: Mapping[str, str], path: str, column: str) -> None:
    missing = [label for label in outputs if label not in words]
    if missing:
        shown = ", ".join(preview(label, 40) for label in sorted(missing)[:8])
        shown += ", ..." if len(missing) > 8 else ""
        raise DataError(
            f"data.verbalizer has no word for {plural(len(missing), 'label')} of {path}, column {column}: {shown}; it has "
            f"words for {', '.join(words)}. Add data.verbalizer={{{sorted(missing)[0][:40]}: WORD, ...}}"
        )
