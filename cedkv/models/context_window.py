"""Whether a run's sequences stay within what every layer of the model sees; decided before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError
from cedkv.models.capabilities import Capabilities
from cedkv.tasks.load import Samples


def longest_sequence(samples: Samples, config: Phase2Config) -> tuple[int, int]:
    """(slots in front, tokens behind) of the longest row that can occur.

    In front of a query stands the prefix or the whole demo; rows of a batch are padded to the longest of each.
    """
    front = max(config.prefix_len, max(len(sample.demo_token_ids) for sample in samples.on))
    behind = [len(sample.query_token_ids) for sample in samples.on] + [len(sample.token_ids) for sample in samples.off]
    return front, max(behind)


def check_context(capabilities: Capabilities, samples: Samples, configs: Sequence[Phase2Config]) -> None:
    """Refuse samples for which some layer would not see all that stands in front of a query.

    Raises:
        ModelError: a layer's window, or chunk, is shorter than the longest sequence.
    """
    for config in configs:
        front, behind = longest_sequence(samples, config)
        for reach in capabilities.reaches:
            if front + behind > reach.tokens:
                raise ModelError(
                    f"model type {capabilities.model_type!r} is refused for these samples before its weights are loaded: "
                    f"{reach.what}, and the longest sequence has {front} slots in front of {behind} tokens = {front + behind}, "
                    f"{reach.tokens} can be used; such a layer would not see a prefix where it is put. Shorten the text, or "
                    "lower data.pairs or prefix_len"
                )
