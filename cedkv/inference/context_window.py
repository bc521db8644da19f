"""What every arm of a run uses of a model's context, held against the model's limits before its weights are loaded.

There are two limits. *Positions*: a model has so many; beyond them learned ones do not exist, rotary ones are extrapolated, and
the angles of ``dynamic`` and ``longrope`` change for every row of the batch that one row is in. *Slots and tokens*: a layer
with a window does not see more of them, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError, UnusableSample
from cedkv.core.values import OnSample, Placement
from cedkv.inference.passes import extra_queries, plan_passes
from cedkv.kv.positioning import place
from cedkv.models.capabilities import Capabilities
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import ModelSpec
from cedkv.selectors.base import selector_class
from cedkv.tasks.context_use import (
    ContextUse,
    base_use,
    off_base_use,
    off_select_use,
    over_demo_use,
    require_positions,
    select_use,
    teacher_use,
)
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.pairing import off_owner, partner
from cedkv.tasks.texts import SampleTexts


def furthest_placement(config: Phase2Config, mode: str, sample: OnSample) -> Placement:
    """Return the placement of as many demo tokens as a selector may keep: no choice of it puts the query further back.

    Raises:
        ConfigError: as ``place``.
    """
    bounded, length, select = selector_class(mode).bounded, len(sample.demo_token_ids), config.select
    most = int(sample.has_bos) + select.keep_sink + select.span_budget * select.span_len
    most = min(most, length) if bounded else length
    room = config.prefix_len if bounded else max(config.prefix_len, most)
    modes = config.injection.positioning_mode, config.prefix.padding_mode
    placements = [place(kept, length, *modes, room) for kept in (range(most), range(length - most, length))]
    return max(placements, key=lambda placement: placement.query_start)


def selection_uses(config: Phase2Config, on: Sequence[OnSample], tokenizer: Any | None) -> Iterator[ContextUse]:
    """Yield what it takes to select spans for every sample, and to answer it under its prefix.

    Args:
        tokenizer: None leaves out the further passes over a demo that a selector's evidence needs.
    """
    extra = {} if tokenizer is None else extra_queries(plan_passes([config]), tokenizer, on)
    for i, (sample, (placement, behind)) in enumerate(zip(on, _states(config, on), strict=True)):
        yield teacher_use(sample)
        for name, queries in extra.items():
            yield over_demo_use(name, sample, len(queries.rows[i]))
        yield select_use(sample, placement, behind)


def arm_uses(config: Phase2Config, samples: Samples, phase: Phase, tokenizer: Any | None) -> Iterator[ContextUse]:
    """Yield what every arm of a run uses for every prompt; arguments as in ``selection_uses``."""
    on, sizes, states = samples.on, config.eval, _states(config, samples.on)
    yield from selection_uses(config, on, tokenizer)
    for i, (sample, (placement, behind)) in enumerate(zip(on, states, strict=True)):
        yield base_use(sample)
        if i < sizes.gate_a_samples:
            yield replace(base_use(sample), arm="gate A", slots=config.prefix_len, given=0, behind="a prefix of null slots")
            padded = replace(placement, slots=max(config.prefix_len, len(placement.kept_tokens)))
            yield replace(select_use(sample, padded, behind, "gate A"), given=0)
        if phase == "2":
            own = furthest_placement(config, "random_span", sample)
            yield select_use(sample, own, _behind(config, "random_span", sample), "random")
    for j, prompt in enumerate(samples.off if phase == "2" else ()):
        yield off_base_use(prompt, sizes.off_tokens)
        placement, behind = states[off_owner(j, len(on))]
        yield off_select_use(prompt.sample_id, len(prompt.student_ids), placement, sizes.off_tokens, behind)


def exceeded(capabilities: Capabilities, use: ContextUse) -> UnusableSample | None:
    """Return the error of a prompt that needs more than a model has, in a pass of its own; None where it fits."""
    try:
        require_positions(use, capabilities.max_positions)
    except UnusableSample as error:
        return error
    for limit in capabilities.context_limits:
        if use.length > limit.tokens:
            return use.beyond("slots and tokens", limit.tokens, limit.reason)
    return None


def load_fitting(
    model: ModelSpec | LanguageModel, configs: Sequence[Phase2Config], phase: Phase, texts: SampleTexts | None = None
) -> Samples:
    """Return the samples of a run, each of which fits the model under every arm of all configurations.

    Args:
        configs: configurations that have their samples in common.
        texts: as in ``load_samples``.

    Raises:
        ConfigError, DataError: as ``load_samples``; samples that do not fit are unusable ones (``data.unusable``).
    """
    beyond: dict[tuple[str, str], UnusableSample] = {}
    while True:
        limits = model.capabilities.max_positions, model.vocabulary
        samples = load_samples(configs[0], model.tokenizer, *limits, texts, beyond)
        uses = (use for config in configs for use in arm_uses(config, samples, phase, model.tokenizer))
        errors = [((use.kind, use.sample_id), error) for use in uses if (error := exceeded(model.capabilities, use))]
        if not errors:
            return samples
        beyond |= dict(reversed(errors))  # of several errors of one sample, the first is told


def check_padded(capabilities: Capabilities, uses: Iterable[ContextUse]) -> None:
    """Reject prompts that fit a window each by itself, and not in one pass, where the longest one of each part pads all.

    Raises:
        ModelError: names the arm, the two prompts and the limit.
    """
    by_arm: dict[str, list[ContextUse]] = {}
    for use in uses:
        by_arm.setdefault(use.arm, []).append(use)
    for limit in capabilities.context_limits:
        for arm, of_arm in by_arm.items():
            slots, tokens = max(of_arm, key=lambda use: use.slots), max(of_arm, key=lambda use: use.tokens)
            given = max(use.given for use in of_arm)
            if slots.slots + tokens.tokens + given > limit.tokens:
                raise ModelError(
                    f"model type {capabilities.model_type!r} is rejected for these samples: {limit.reason}, and a pass of the "
                    f"arm {arm!r} has up to {slots.slots} slots (of sample {slots.sample_id}) and {tokens.tokens} + {given} "
                    f"tokens (of sample {tokens.sample_id}), {limit.tokens} can be used; such a layer would not see the whole "
                    "prefix. Run samples one by one (runtime.batch_size=1), shorten the text, or lower data.pairs or prefix_len"
                )


def check_context(model: ModelSpec, configs: Sequence[Phase2Config], samples: Samples, phase: Phase) -> None:
    """Reject a run whose samples do not fit a layer's window when they share a pass. Raises ModelError as ``check_padded``."""
    for config in configs if model.capabilities.context_limits else ():
        if config.rows_per_pass != 1:
            check_padded(model.capabilities, arm_uses(config, samples, phase, model.tokenizer))


def require_fits(capabilities: Capabilities, uses: Iterable[ContextUse]) -> None:
    """Raise ModelError for the first prompt that needs more than a model has."""
    for use in uses:
        if (error := exceeded(capabilities, use)) is not None:
            raise ModelError(str(error))


def _states(config: Phase2Config, on: Sequence[OnSample]) -> list[tuple[Placement, str]]:
    """Return for each sample the placement of the prefix that it runs under, and what that is called."""
    mode = config.select.mode
    with_partners = selector_class(mode).uses_partner
    owners = [on[partner(i, len(on)) if with_partners else i] for i in range(len(on))]
    return [(furthest_placement(config, mode, owner), _behind(config, mode, owner)) for owner in owners]


def _behind(config: Phase2Config, mode: str, owner: OnSample) -> str:
    positioning = config.injection.positioning_mode
    return f"the prefix of {owner.sample_id} (select.mode={mode}, injection.positioning_mode={positioning})"
