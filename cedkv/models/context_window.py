"""Check, before weights are loaded, that every layer of a model can attend to the longest sequence of a run."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError
from cedkv.models.capabilities import Capabilities
from cedkv.tasks.load import Samples


def longest_sequence(samples: Samples, config: Phase2Config) -> tuple[int, int]:
    """Return (slots in front of the query, query tokens) of the longest row that can occur.

    The slots in front of a query contain the prefix or the whole demo; a batch is padded to its longest row in both parts.
    Behind a query stands its answer but the last token, behind an OFF prompt what base answers (``eval.off_tokens``).
    """
    slots = max(config.prefix_len, max(len(sample.demo_token_ids) for sample in samples.on))
    query_lengths = [len(sample.query_token_ids) + len(sample.answer_token_ids) - 1 for sample in samples.on]
    query_lengths += [len(sample.token_ids) + config.eval.off_tokens for sample in samples.off]
    return slots, max(query_lengths)


def check_context(capabilities: Capabilities, samples: Samples, configs: Sequence[Phase2Config]) -> None:
    """Reject samples for which some layer could not attend to everything in front of a query.

    Raises:
        ModelError: the attention window, or chunk, of a layer is shorter than the longest sequence.
    """
    for config in configs:
        slots, query_tokens = longest_sequence(samples, config)
        length = slots + query_tokens
        for limit in capabilities.context_limits:
            if length > limit.tokens:
                raise ModelError(
                    f"model type {capabilities.model_type!r} is rejected for these samples before its weights are loaded: "
                    f"{limit.reason}, and the longest sequence has {slots} slots in front of {query_tokens} tokens = {length}, "
                    f"{limit.tokens} can be used; such a layer would not see the whole prefix. Shorten the text, or lower "
                    "data.pairs or prefix_len"
                )
