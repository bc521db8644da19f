"""Select spans of a demonstration for one query or many, and encode them as prefixes: the engine's own steps, on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

from pydantic_core import to_jsonable_python

from cedkv.checks import certificate
from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview
from cedkv.core.values import OnEpisode, OnSample
from cedkv.inference.batch import silent
from cedkv.inference.context_window import check_padded, require_fits, selection_uses
from cedkv.inference.evidence import head_weights_key, read_batch
from cedkv.inference.head_weights import ensure_head_weights, fitted_scores
from cedkv.inference.passes import check_loaded_readings
from cedkv.inference.quality import judge
from cedkv.inference.student import Students
from cedkv.library.answering import row_of
from cedkv.library.prefixes import PrefixBatch, SelectedPrefix
from cedkv.library.settings import ConfigLike, configuration, keys_of
from cedkv.library.texts import Kinds, Range, episodes_of, samples_of
from cedkv.models import loading
from cedkv.models.capabilities import check_supported
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.selectors.base import Selector, needed_of_episode, selector_class

USED = ("select", "prefix", "injection", "layer_scope", "prefix_len", "seed")
"""Blocks, and keys outside of blocks, that a selection depends on."""
REMEDIES = {
    "gold": "gold=(start, end), the characters of the demo that hold the answer",
    "shots": "shots=[(start, end), ...], the characters of each solved example, or answers=[...], which say where each ends",
    "other_query_text": "other_query=..., another question about the same demo",
}
"""What a selector needs of an episode -> the argument that gives it."""


@overload
def select_kv(
    lm: LanguageModel, demo: str, query: str, selector: str | Selector | None = ..., **settings: Any
) -> SelectedPrefix: ...


@overload
def select_kv(
    lm: LanguageModel, demo: str, query: list[str], selector: str | Selector | None = ..., **settings: Any
) -> PrefixBatch: ...


def select_kv(
    lm: LanguageModel,
    demo: str,
    query: str | list[str],
    selector: str | Selector | None = None,
    *,
    params: dict[str, Any] | None = None,
    config: ConfigLike = None,
    answers: Sequence[str] = (),
    demo_kinds: Kinds | None = None,
    shots: Sequence[Range] | None = None,
    gold: Range | Sequence[Range] | None = None,
    other_query: str | list[str] | None = None,
    control_tokens: bool = False,
    **settings: Any,
) -> SelectedPrefix | PrefixBatch:
    """Select spans of a demonstration and encode them as the KV prefix to put in front of a query.

    These are the steps of the engine's select arm: demo and query are tokenised jointly, the teacher's evidence is read, spans
    are chosen, placed and encoded. A demo that several queries share is prefilled once, where the selector's score allows it.

    Args:
        demo: the demonstration. The query follows it directly, so it ends with the line break or space that belongs between.
        query: one query, or several about the same demo, each of which gets a selection of its own. End it where a token of
            the answer can begin: ``"Symbol:"``, not ``"Symbol: "``.
        selector: registered name, ``package.module:Class``, or a selector with its parameters; None for the configuration's.
        params: parameters of a selector that is given by name.
        config: path of a YAML file, or a configuration, of which ``select``, ``prefix``, ``injection``, ``layer_scope``,
            ``prefix_len`` and ``seed`` are used.
        answers: words of the demo that are answers: no span starts there, and a shot ends there. Without ``answers`` and
            ``demo_kinds``, words are input, and whitespace and punctuation are delimiters.
        demo_kinds: ``(start, end, kind)`` over the demo's characters (``input``, ``delimiter`` or ``answer``), ascending;
            characters in no range are delimiters.
        shots: characters of each solved example, ascending; for ``whole_shots``. Without them, a shot ends with an answer.
        gold: characters of the demo that hold the answer, of one query or of each; for ``oracle_span``.
        other_query: another question about the demo, for one query or for each; for ``transfer_span``.
        control_tokens: whether text that spells a control token becomes it, as in text that a chat template made.
        settings: keys of the used blocks by their short names (``span_len=8``, ``kv_source="gather"``) or in full.

    Returns:
        The prefix; a batch of them, in the order of the queries, where ``query`` is a list.

    Raises:
        ConfigError: an unknown or unused setting, contradicting settings, or something the selector needs and was not given.
        DataError: the texts cannot be tokenised apart, or hold no span to choose.
        ModelError: the model does not support this, or the texts are longer than it can attend to.
        NumericsError: a logit, key or value is not finite.
    """
    queries = [query] if isinstance(query, str) else list(query)
    if not queries:
        raise ConfigError("select_kv: query is an empty list; give at least one query")
    values = keys_of(settings, "select_kv", USED) | _chosen(selector, params)
    resolved = configuration(config, {**values, "eval.lds_masks": None})  # nothing is judged by the answers under masks
    episodes = episodes_of(demo, queries, answers, demo_kinds, shots, gold, other_query, control_tokens)
    _check_given(resolved, episodes)
    samples = samples_of(lm, resolved, episodes)
    _check(lm, resolved, samples)
    prefixes = _select(lm, resolved, samples)
    return prefixes[0] if isinstance(query, str) else prefixes


def _select(lm: LanguageModel, config: Phase2Config, samples: list[OnSample]) -> PrefixBatch:
    """Run the engine's steps on samples of one demo."""
    batch = read_batch(lm, [config], samples, None, silent)
    students = Students(batch, [config])
    chosen = students.chosen[0]
    student = students.select(chosen.select)
    judged = judge(batch, config, chosen.evidence, chosen.select.selections, silent)
    prefixes = []
    for row, sample in enumerate(samples):
        worth, placement = judged[row].worth, chosen.select.placements[row]
        prefixes.append(
            SelectedPrefix(
                lm=lm,
                sample=sample,
                selection=chosen.select.selections[row],
                placement=placement,
                scores=chosen.evidence[row].attention if worth is None else worth,
                scores_of="attention" if worth is None else "selector",
                injection=config.layer_scope.injection,
                kv=row_of(student.prefix, row, placement.slots),
            )
        )
    return PrefixBatch(prefixes, student.prefix)


def _chosen(selector: str | Selector | None, params: dict[str, Any] | None) -> dict[str, Any]:
    """Return the configuration keys of a selector: its own parameters, never those of another one in the configuration."""
    if selector is None:
        return {} if params is None else {"select.params": params}
    if isinstance(selector, str):
        return {"select.mode": selector, "select.params": params or {}}
    if not isinstance(selector, Selector):
        raise ConfigError(
            f"select_kv: selector = {preview(selector)} is neither a name nor a selector; a class needs its brackets: Tova()"
        )
    if params is not None:
        raise ConfigError("select_kv: params are of a selector that is given by name; a selector object has its own")
    own = {field.name: getattr(selector, field.name) for field in fields(selector)}
    return {"select.mode": SELECTORS.name_of(type(selector)), "select.params": to_jsonable_python(own)}


def _check_given(config: Phase2Config, episodes: Sequence[OnEpisode]) -> None:
    """Raise ConfigError for what the selector needs and texts alone do not give."""
    mode = config.select.mode
    if selector_class(mode).uses_partner:
        raise ConfigError(
            f"select_kv: {mode} gives a query the prefix of another demo, and all queries here share one; use another "
            "selector, or select from the other demo yourself"
        )
    for field in sorted(needed_of_episode(config)):
        if any(getattr(episode, field) is None for episode in episodes):
            raise ConfigError(f"select_kv: {mode} needs {REMEDIES[field]}; give it, or use another selector")


def _check(lm: LanguageModel, config: Phase2Config, samples: Sequence[OnSample]) -> None:
    """Reject what this model cannot do, as a run does, and fit head weights where the selector needs them."""
    check_supported(lm.capabilities, config)
    loading.check_loaded(lm, config)
    check_loaded_readings(lm, [config])
    uses = list(selection_uses(config, samples, lm.tokenizer))
    require_fits(lm.capabilities, uses)
    check_padded(lm.capabilities, uses)
    if any(head_weights_key(score.reading) not in lm.measured for score in fitted_scores([config])):
        cache_dir = config.model.cache_dir
        identity = certificate.identity(lm, fingerprint(lm))
        ensure_head_weights(lm, [config], identity, certificate.measurements_folder(cache_dir, "head_weights"))


def load_prefix(lm: LanguageModel, path: str | Path) -> SelectedPrefix:
    """Load a prefix that ``SelectedPrefix.save`` wrote with this model.

    Raises:
        DataError: the file is missing, damaged or edited, or the prefix was made by another model, tokenizer, dtype or
            version, whose K/V mean nothing here; each difference is named.
    """
    return SelectedPrefix.load(lm, Path(path))
