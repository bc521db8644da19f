"""Check that a run's sequences stay within what every layer of the model sees, before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError
from cedkv.models.capabilities import Capabilities
from cedkv.tasks.load import Samples


def longest_sequence(samples: Samples, config: Phase2Config) -> tuple[int, int]:
    """Return (slots in front of the query, query tokens) of the longest row that can occur.

    The slots in front of a query hold the prefix or the whole demo; a batch is padded to its longest row in both parts.
    """
    front = max(config.prefix_len, max(len(sample.demo_token_ids) for sample in samples.on))
    query_lengths = [len(sample.query_token_ids) for sample in samples.on] + [len(sample.token_ids) for sample in samples.off]
    return front, max(query_lengths)


def check_context(capabilities: Capabilities, samples: Samples, configs: Sequence[Phase2Config]) -> None:
    """Raise if some layer would not see everything in front of a query.

    Raises:
        ModelError: a layer's window, or chunk, is shorter than the longest sequence.
    """
    for config in configs:
        front, query_tokens = longest_sequence(samples, config)
        length = front + query_tokens
        for limit in capabilities.context_limits:
            if length > limit.tokens:
                raise ModelError(
                    f"model type {capabilities.model_type!r} is rejected for these samples before its weights are loaded: "
                    f"{limit.reason}, and the longest sequence has {front} slots in front of {query_tokens} tokens = {length}, "
                    f"{limit.tokens} can be used; such a layer would not see the whole prefix. Shorten the text, or lower "
                    "data.pairs or prefix_len"
                )
