"""Show samples as a model gets them, without its weights: texts with token kinds, counts, lengths, what cannot be used."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from cedkv.cli.click_ext import PHASE2_FLAGS
from cedkv.config.options import OPTIONS
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, DataError
from cedkv.core.files import atomic_write
from cedkv.core.text import escape_control, plural, preview, sanitize
from cedkv.core.values import OffSample, OnSample
from cedkv.inference.context_window import load_fitting
from cedkv.models.opening import open_spec
from cedkv.tasks.episode_rows import as_line
from cedkv.tasks.load import Samples
from cedkv.tasks.texts import read_sample_texts

WIDTH = 110
"""Characters on a line of shown text."""
HEAD_LINES, TAIL_LINES, AROUND_GOLD = 12, 6, 2
"""Lines that are shown of a long demo: its first and last, and those next to the gold tokens."""
_STYLES: dict[str, dict[str, Any]] = {
    "bos": {"fg": "magenta"}, "input": {}, "delimiter": {"dim": True}, "answer": {"fg": "green"}, "query": {"fg": "cyan"},
}  # fmt: skip
_LETTERS = {"bos": "b", "input": "i", "delimiter": "d", "answer": "a", "query": "q"}
_TEXT_KEYS = ("data.on_path", "data.off_path", "data.shots_from", "data.template", "model.id", "model.revision")

Piece = tuple[str, str, bool]
"""A token's text, its kind, and whether it is gold."""


def show_data(
    path: str | None,
    overrides: Sequence[str],
    options: Mapping[str, str | None],
    show: int,
    target: str | None,
    off: bool,
    echo: Callable[[str], None],
    colour: bool,
) -> None:
    """Print what a configuration's samples are; those that cannot be used are counted, not refused.

    Args:
        path, overrides, options: as for ``resolve``.
        show: how many samples are shown as text.
        target: file for the usable episodes as JSON Lines, which ``data.on_path`` reads back; None for none.
        off: show OFF prompts.
        colour: mark tokens by colour, else by letters below the text.

    Raises:
        CedkvError: configuration, files or tokenizer cannot be used, or no sample can.
    """
    given = resolve(path, overrides, options)
    config = given.model_copy(update={"data": given.data.model_copy(update={"unusable": "skip"})})
    if off and target is not None:
        raise ConfigError("--out writes episodes and --off shows OFF prompts; leave one of the two out")
    texts = read_sample_texts(config)
    spec = open_spec(config)
    samples = load_fitting(spec, [config], "2", texts)
    decode = _decoder(spec.tokenizer)
    for sample in (samples.off if off else samples.on)[:show]:
        _show(sample, decode, echo, colour)
    if show:
        echo(_legend(colour))
    echo("")
    columns = None if off or texts.columns is None else str(texts.columns)
    for name, text in _facts(samples, off, columns):
        echo(f"{name:<11}{escape_control(text)}")
    if target is not None:
        with atomic_write(Path(target)) as file:
            file.writelines(json.dumps(as_line(sample.episode), ensure_ascii=False) + "\n" for sample in samples.on)
        echo(f"{'written':<11}{plural(len(samples.on), 'episode')} to {target}")
    echo(f"\nRun it:\n  {run_command(given, path, overrides, options, bool(samples.unusable))}")


def run_command(
    config: Phase2Config, path: str | None, overrides: Sequence[str], options: Mapping[str, str | None], skips: bool
) -> str:
    """Return the command that evaluates these samples. ``skips``: some must be left out."""
    words = ["python", "-m", "cedkv", "--phase", "2", *([] if path is None else ["--config", path])]
    for name, value in options.items():
        if value is not None and name in PHASE2_FLAGS:
            words += [f"--phase2-{name.replace('_', '-')}", value]
    for name, value in options.items():
        if value is not None and name not in PHASE2_FLAGS:
            key = OPTIONS[name][0]
            quoted = json.dumps(value) if key in _TEXT_KEYS and set(value) & set(",'\"[]{}") else value
            words += ["--set", f"{key}={quoted}"]
    for override in overrides:
        words += ["--set", override]
    if skips and config.data.unusable == "refuse":
        words += ["--set", "data.unusable=skip"]
    return shlex.join(words)


def _facts(samples: Samples, off: bool, columns: str | None) -> Iterable[tuple[str, str]]:
    """Yield the lines of the summary: what it is about, and its text."""
    kind, some = ("OFF", samples.off) if off else ("ON", samples.on)
    unusable = [each for each in samples.unusable if each.kind == kind]
    left_out = sum(each.count for each in unusable)
    yield "source", samples.off_source if off else samples.on_source
    if columns is not None:
        yield "columns", columns
    unit = "OFF prompts" if off else "ON samples"
    yield "samples", f"{len(some)} {unit}" + (f"; {left_out} cannot be used" if left_out else "")
    for each in unusable:
        examples = ", ".join(preview(name, 40) for name in each.examples)
        yield "unusable", f"{each.count} x {each.reason}: {examples}{', ...' if each.count > len(each.examples) else ''}"
    if off:
        yield "tokens", _spread([len(sample.token_ids) for sample in samples.off])
    else:
        labels = Counter(s.episode.answer_text for s in samples.on if s.episode.labels is not None)
        if labels:
            shown = ", ".join(f"{label!r} {count}" for label, count in labels.most_common(20))
            yield "labels", shown + (", ..." if len(labels) > 20 else "")
        for name, lengths in (
            ("demo", [len(s.demo_token_ids) for s in samples.on]),
            ("query", [len(s.query_token_ids) for s in samples.on]),
            ("answer", [len(s.answer_token_ids) for s in samples.on]),
        ):
            yield name, _spread(lengths)
        golds = sum(sample.gold_tokens is not None for sample in samples.on)
        others = sum(sample.other_query_ids is not None for sample in samples.on)
        yield "evidence", f"gold in {golds}, another query in {others}, shots in {sum(bool(s.shot_tokens) for s in samples.on)}"
    for note in samples.notes:
        yield "note", note


def _spread(lengths: Sequence[int]) -> str:
    if not lengths:
        raise DataError("no sample can be used; correct what is listed above")
    return f"{min(lengths):,} / {median(lengths):,g} / {max(lengths):,} tokens (least / median / most)"


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    return lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _show(sample: OnSample | OffSample, decode: Callable[[int], str], echo: Callable[[str], None], colour: bool) -> None:
    echo(click.style(f"--- {sanitize(sample.sample_id)}", bold=True) if colour else f"--- {sanitize(sample.sample_id)}")
    if isinstance(sample, OffSample):
        _show_pieces([(decode(token), "query", False) for token in sample.token_ids], echo, colour)
        return
    first, last = sample.gold_tokens or (0, 0)
    demo = [
        (decode(token), str(kind), first <= i < last)
        for i, (token, kind) in enumerate(zip(sample.demo_token_ids, sample.token_kinds, strict=True))
    ]
    query = [(decode(token), "query", False) for token in sample.query_token_ids]
    answer = "".join(decode(token) for token in sample.answer_token_ids)
    _show_pieces([*demo, *query], echo, colour)
    echo(f"=> {escape_control(answer)!r} ({plural(len(sample.answer_token_ids), 'token')})")


def _show_pieces(pieces: Sequence[Piece], echo: Callable[[str], None], colour: bool) -> None:
    lines = _lines(pieces)
    golden = {i for i, line in enumerate(lines) if any(gold for _, _, gold in line)}
    near = {i + shift for i in golden for shift in range(-AROUND_GOLD, AROUND_GOLD + 1)} if len(golden) < HEAD_LINES else golden
    left_out = 0
    for i, line in enumerate(lines):
        if HEAD_LINES <= i < len(lines) - TAIL_LINES and i not in near:
            left_out += 1
            continue
        if left_out:
            echo(f"    [{plural(left_out, 'line')} left out]")
            left_out = 0
        if colour:
            echo("".join(click.style(text, **_STYLES[kind], bold=gold, underline=gold) for text, kind, gold in line))
        else:
            echo("".join(text for text, _, _ in line))
            echo("".join(_mark(text, kind, gold) for text, kind, gold in line).rstrip())


def _lines(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return pieces as lines for a terminal; line breaks are shown, then followed, several of them once."""
    lines, width, broken = list[list[Piece]]([[]]), 0, False
    for text, kind, gold in pieces:
        for part in re.findall(r"\n+|[^\n]+", text.replace("\r\n", "\n")):
            is_break = part[0] == "\n"
            shown = "\u23ce" * len(part) if is_break else escape_control(part)
            if lines[-1] and not is_break and (broken or width + len(shown) > WIDTH):
                lines.append([])
                width = 0
            lines[-1].append((shown, kind, gold))
            width, broken = width + len(shown), is_break
    return lines


def _mark(text: str, kind: str, gold: bool) -> str:
    """Return what stands below a token: the letter of its kind where it begins, a capital if it is gold."""
    letter = _LETTERS[kind].upper() if gold else _LETTERS[kind]
    return letter.ljust(len(text), "-")


def _legend(colour: bool) -> str:
    if colour:
        named = ", ".join(click.style(kind, **style) for kind, style in _STYLES.items())
        return f"\nkinds of tokens: {named}; {click.style('gold, which holds the answer', bold=True, underline=True)}"
    named = ", ".join(f"{letter} {kind}" for kind, letter in _LETTERS.items())
    return f"\nbelow each token its kind: {named}; a capital: gold, which holds the answer"
