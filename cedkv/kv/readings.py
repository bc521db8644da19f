"""What can be read of a model about each demo token, and how per-head readings become one score per token. Pure.

A *reading* is a number per layer, head and demo token, or one per layer and span start. A ``TokenScore`` is a reading with
its aggregation: over heads, then over the layers of a scope, then over neighbouring tokens. All heads and layers share one
selection here, which most of the methods below do not ask of themselves: they choose tokens per head or per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

Pooling = Literal["mean", "max"]
Scope = str | tuple[int, ...]
"""``all``, ``topNN``, ``midNN``, or layers."""


@dataclass(frozen=True)
class Reading:
    """Something that is read per layer, head and demo token.

    Class variables:
        weighs_values: uses the output projection W_o, which the model must have in a form known here.
        from_cache: is computed from the demo's cached keys and values, which are kept for it.
        linear_scores: needs attention scores that are linear in the query: no soft cap.
    """

    weighs_values: ClassVar[bool] = False
    from_cache: ClassVar[bool] = False
    linear_scores: ClassVar[bool] = False


@dataclass(frozen=True)
class RowAttention(Reading):
    """Attention A_ij of the last ``window`` rows of a query to each demo token j, pooled over the rows i.

    window: None for all rows of the query.
    over_input: each row i is divided by ||h_i||, the norm of the attention module's input.
    """

    window: int | None
    pooling: Pooling
    over_input: bool = False


@dataclass(frozen=True)
class ValueNorm(Reading):
    """||W_o v_j||: the norm of what token j's value writes into the residual stream through a head's slice of W_o."""

    weighs_values: ClassVar[bool] = True


@dataclass(frozen=True)
class QueryAttention(Reading):
    """Attention of a query to the demo: ``rows``, less that of a null query, times ``||W_o v_j||``, each where it is set.

    query: the sample's own query, or its other one.
    """

    rows: RowAttention
    value_weighted: bool = False
    null_query: bool = False
    query: Literal["own", "other"] = "own"

    @property
    def weighs_values(self) -> bool:  # type: ignore[override]
        return self.value_weighted


@dataclass(frozen=True)
class ReceivedAttention(Reading):
    """Attention that a demo token receives from all later tokens, divided by their number (H2O, Zhang et al. 2023)."""


@dataclass(frozen=True)
class ReplayAttention(Reading):
    """Largest attention of a repetition of the demo, after an instruction to repeat it (KVzip, Kim et al. 2025).

    plus: A_ij x ||W_o v_j|| / ||h_i|| in place of A_ij (KVzip+).
    """

    plus: bool = False

    @property
    def weighs_values(self) -> bool:  # type: ignore[override]
        return self.plus


@dataclass(frozen=True)
class ExpectedAttention(Reading):
    """(softmax_j(z) + epsilon) ||W_o v_j|| of a normal distribution of queries (Devoto et al. 2025, arXiv 2510.00636).

    Queries of the demo before RoPE are taken as N(mu, Sigma), rotated by the mean R of the rotations to the ``future``
    positions after the demo: z_j = (R mu) k_j s + k_j^T R Sigma R^T k_j s^2 / 2, with s the model's scaling. The first
    ``sinks`` tokens take no part and score 0.
    """

    future: int = 512
    epsilon: float = 1e-2
    sinks: int = 4
    weighs_values: ClassVar[bool] = True
    linear_scores: ClassVar[bool] = True


@dataclass(frozen=True)
class KeyNorm(Reading):
    """-||k_j|| (Devoto et al. 2024, arXiv 2406.11430)."""

    from_cache: ClassVar[bool] = True


@dataclass(frozen=True)
class KeyDifference(Reading):
    """-cos(k_j, mean key of the demo), of rotated keys (KeyDiff, Park et al. 2025, arXiv 2504.15364)."""

    from_cache: ClassVar[bool] = True


@dataclass(frozen=True)
class LagRelative(Reading):
    """Rank of a token in its partition by how far its key and value spread, on the scale of the next partition (LagKV).

    Liang et al. 2025, arXiv 2504.04704. After ``sinks`` tokens the demo is cut into partitions of ``lag`` tokens. With min
    and max per channel over the next partition, u = softmax_j(std_channels((x_j - min) / (max - min))) for keys and for
    values; the score is the rank of their mean, from 0 to (lag - 1) / lag. Sinks, and the tokens that no partition follows,
    score 1.
    """

    lag: int = 16
    sinks: int = 4
    from_cache: ClassVar[bool] = True


@dataclass(frozen=True)
class SpanDrop(Reading):
    """How far the heads' outputs move when the span of ``span_len`` tokens from each start is hidden, in closed form.

    With p_S = sum_S A_ij, v_S = sum_S A_ij v_j / p_S and o_i = sum_j A_ij v_j: p_S / (1 - p_S) ||W_o (o_i - v_S)||, summed
    over the last ``window`` query rows i and over heads.
    """

    span_len: int
    window: int | None
    weighs_values: ClassVar[bool] = True


@dataclass(frozen=True)
class TokenScore:
    """A reading and its aggregation to one score per demo token.

    heads: over the heads of a layer; ``fitted``: the sum over heads and layers with weights that were fitted on held-out
    episodes. layers: over the layers of ``scope``; max over heads and layers is the max over all heads. kernel: width of the
    mean over neighbouring tokens, odd; tokens outside the demo count as 0, as in SnapKV.
    """

    reading: Reading
    heads: Literal["mean", "max", "fitted"] = "mean"
    layers: Pooling = "mean"
    kernel: int = 1
    scope: Scope = "all"

    def of(self, reading: Reading) -> TokenScore:
        """Return the same aggregation of another reading."""
        return replace(self, reading=reading)

    def attending(self, **changes: Any) -> TokenScore:
        """Return the same aggregation with fields of its ``QueryAttention`` changed. Raises TypeError: it reads another."""
        if not isinstance(self.reading, QueryAttention):
            raise TypeError(f"a score of {type(self.reading).__name__} reads no query's attention")
        return self.of(replace(self.reading, **changes))
