"""The phase2 configuration: one schema, against which files, overrides and options are validated.

Order of precedence: defaults below < YAML file < ``set`` overrides < named options. ``configs/phase2.yaml`` spells out the same
defaults, with a comment per key (a test keeps them equal). Values are immutable once resolved.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from cedkv.config.data import DataBlock
from cedkv.config.extensions import KV_SOURCES, PADDING, POSITIONING, SELECTORS
from cedkv.config.fields import Block, Count, ShardName, Text, filled_params, name_in
from cedkv.core.shards import Shard

SelectorName = Annotated[str, AfterValidator(name_in(SELECTORS))]
PositioningName = Annotated[str, AfterValidator(name_in(POSITIONING))]
PaddingName = Annotated[str, AfterValidator(name_in(PADDING))]
KVSourceName = Annotated[str, AfterValidator(name_in(KV_SOURCES))]
Limit = Annotated[float, Field(ge=0)]
LayerScope = (
    Annotated[str, Field(pattern=r"^(all|(top|mid)([1-9]\d?|100))$")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
)
Dtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["mean", "max"]


KL_LIMIT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest KL in nats between two mathematically identical computations, by dtype; used where a threshold is null.

Measured on a 135M Llama: 1e-7 in float32, 3e-3 in bfloat16. The limits are well above the effect of rounding and far below
the effect of a wrong position or a wrong mask (1e-2 and more in float32). The same numbers limit relative errors of rotated
keys: rounding makes these errors at most 6 units of the dtype, 0.047 in bfloat16 and 0.006 in float16 (the check
``rotation_equivariance``).
"""


_RESERVED = {
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "sanitize_control_tokens", "bos_token",
}  # fmt: skip
"""Arguments of ``apply_chat_template`` that the suite sets itself, or that would give something other than text."""


class ModelBlock(Block):
    """Which model, and what is allowed with its checkpoint."""

    id: Text = "Qwen/Qwen2.5-1.5B-Instruct"
    revision: Text | None = None
    cache_dir: Text | None = None
    chat_template: bool = True
    template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    allow_uncertified: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template_kwargs and not self.chat_template:
            raise ValueError(
                "model.template_kwargs are given to the chat template, and model.chat_template = false drops it; leave one of "
                "the two out"
            )
        reserved = _RESERVED.intersection(self.template_kwargs)
        if reserved:
            raise ValueError(
                f"model.template_kwargs: {', '.join(sorted(reserved))} would change how the template is called; give only what "
                "the template itself reads, as {enable_thinking: false}"
            )
        return self


class RuntimeBlock(Block):
    """Device, dtype, batch size, threads, workers, which part of the run, exit code, and how MLflow is used."""

    backend: Literal["hf"] = "hf"
    allow_mock_fallback: bool = False
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    device_map: Literal["auto"] | None = None
    torch_dtype: Dtype = "float32"
    batch_size: Annotated[int, Field(ge=1, le=65_536)] | Literal["auto"] = "auto"
    threads: Count | None = None
    workers: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] | None = None
    ray_address: Annotated[str, Field(pattern=r"^(auto|(ray://)?[\w.:\[\]-]+:\d+)$")] | None = None
    mixed_devices: bool = False
    shard: ShardName | None = None
    fail_on_gate: bool = False
    mlflow_timeout: Annotated[int, Field(ge=4, le=3600)] = 60
    system_metrics: bool = False
    allow_other_code: bool = False

    @model_validator(mode="after")
    def _check_weights_and_devices(self) -> Self:
        if self.allow_mock_fallback:
            raise ValueError(
                "runtime.allow_mock_fallback = true is rejected: a verdict on a mock says nothing about a model, so the "
                "suite runs on real weights or not at all; leave it false"
            )
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"runtime.device_map = {self.device_map} spreads the model over all devices, and runtime.device = "
                f"{self.device} names one; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.workers is None and self.ray_address is not None:
            raise ValueError(
                f"runtime.ray_address = {self.ray_address} says where workers are, and runtime.workers = null asks for none; "
                "set workers=auto or a number, or leave ray_address out"
            )
        if self.workers is not None and self.device_map is not None:
            raise ValueError(
                f"runtime.device_map = {self.device_map} spreads a model over all cards, and each of runtime.workers = "
                f"{self.workers} has one card; leave one of them out"
            )
        if self.workers is not None and (self.device == "mps" or ":" in self.device):
            raise ValueError(
                f"runtime.device = {self.device} is one card, and runtime.workers = {self.workers} get theirs from Ray: set "
                "device to auto, cuda or cpu, or leave workers out"
            )
        return self


class EvalBlock(Block):
    """Sample counts and repetitions."""

    on_samples: Count = 64
    off_samples: Count = 128
    off_tokens: Annotated[int, Field(ge=0, le=256)] = 8
    repro_runs: Annotated[int, Field(ge=2, le=100)] = 2
    n_random_trials: Annotated[int, Field(ge=1, le=1000)] = 5
    decoding: Literal["greedy"] = "greedy"
    gate_a_samples: Count = 8
    lds_masks: Annotated[int, Field(ge=0, le=4096)] | None = None

    @property
    def n_lds_masks(self) -> int:
        """How many span masks LDS is measured under: none where ``lds_masks`` is null."""
        return self.lds_masks or 0


class PrefixBlock(Block):
    """Slots of a prefix, the source of its keys and values, and what is run again."""

    padding_mode: PaddingName = "null_pad"
    kv_source: KVSourceName = "prefill"
    boundary_replay: Annotated[int, Field(ge=0, le=64)] = 0

    @model_validator(mode="after")
    def _check_replay(self) -> Self:
        if self.boundary_replay and self.kv_source == "prefill":
            raise ValueError(
                f"prefix.boundary_replay = {self.boundary_replay} runs tokens of a gathered prefix again, and prefix.kv_source "
                "= prefill runs all of them anyway; set kv_source=gather, or leave boundary_replay at 0"
            )
        return self


class InjectionBlock(Block):
    """Rotary positions of the injected prefix and the query."""

    positioning_mode: PositioningName = "compact"


class SelectBlock(Block):
    """Which spans of a demo are kept."""

    mode: SelectorName = "attention_diversity_span"
    params: dict[str, JsonValue] = Field(default_factory=dict)
    span_len: Count = 8
    span_budget: Count = 4
    min_span_distance: Annotated[int, Field(ge=1)] = 8
    candidate_policy: Literal["input_and_delimiter_only"] = "input_and_delimiter_only"
    center_policy: Literal["start", "center"] = "start"
    keep_sink: Annotated[int, Field(ge=0)] = 0
    query_window: Count | Literal["all"] = "all"
    row_pooling: Pooling = "max"
    head_pooling: Pooling = "max"
    layer_pooling: Pooling = "max"
    pooling_kernel: Annotated[int, Field(ge=1, le=255)] = 1
    value_weighting: Literal["none", "output_norm"] = "none"
    null_query: bool = False
    causal_drop_advisory: bool = False

    @field_validator("pooling_kernel")
    @classmethod
    def _check_odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"{kernel} has no middle token: the scores would be shifted; use {kernel - 1} or {kernel + 1}")
        return kernel

    @model_validator(mode="after")
    def _check_params(self) -> Self:
        """Check the selector's parameters and write out those that have their default, so that every run records them."""
        object.__setattr__(self, "params", filled_params(SELECTORS, self.mode, self.params, "select.params"))
        return self


class LayerScopeBlock(Block):
    """Layers whose attention is read, and layers that see the prefix."""

    selection: LayerScope = "top25"
    injection: LayerScope = "all"


class ThresholdsBlock(Block):
    """Limits of Gate B, then of Gate A; None: the limit of the dtype (``KL_LIMIT``)."""

    on_gain_min: float = 0.10
    off_delta_p99_max: Limit = 1.0
    off_entropy_min: Limit = 0.05
    delta_on_min: Limit = 0.10
    rel_kl_to_teacher_max: Limit = 1.0
    repro_acc_tol: Limit = 0.02
    teacher_incremental_kl_max: Limit | None = None
    null_effect_kl_max: Limit | None = None
    nonzero_effect_over_floor_min: Annotated[float, Field(ge=1)] = 10.0
    roundtrip_rel_kl_max: Limit = 1e-3
    keep_all_kl_max: Limit | None = None
    padding_kl_max: Limit | None = None
    batch_kl_max: Limit | None = None
    rotation_rel_error_max: Limit | None = None
    source_cache_diff_max: Limit = 0.0


class ReportingBlock(Block):
    """What records contain beyond the metrics."""

    topk_tokens: Annotated[int, Field(ge=1, le=100)] = 5


class Phase2Config(Block):
    """All settings of a run."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 42
    model: ModelBlock = ModelBlock()
    runtime: RuntimeBlock = RuntimeBlock()
    eval: EvalBlock = EvalBlock()
    prefix_len: Count = 64
    prefix: PrefixBlock = PrefixBlock()
    injection: InjectionBlock = InjectionBlock()
    select: SelectBlock = SelectBlock()
    layer_scope: LayerScopeBlock = LayerScopeBlock()
    thresholds: ThresholdsBlock = ThresholdsBlock()
    reporting: ReportingBlock = ReportingBlock()
    data: DataBlock = DataBlock()

    @model_validator(mode="after")
    def _check_prefix_len(self) -> Self:
        need = self.select.span_budget * self.select.span_len + self.select.keep_sink
        if need > self.prefix_len:
            raise ValueError(
                f"select.span_budget x select.span_len + select.keep_sink = {self.select.span_budget} x "
                f"{self.select.span_len} + {self.select.keep_sink} = {need} tokens cannot fit prefix_len = "
                f"{self.prefix_len}: raise prefix_len to {need} or more, or lower span_budget, span_len or keep_sink"
            )
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.data.format == "chat" and not self.model.chat_template:
            raise ValueError(
                "data.format = chat writes shots by the chat template, and model.chat_template = false drops it; leave one of "
                "the two out"
            )
        if self.data.format == "chat" and self.data.template is not None:
            raise ValueError(
                "data.template says how shots are written as plain text, and data.format = chat writes them by the chat "
                "template; leave one of the two out"
            )
        return self

    def for_phase(self, phase: str) -> Phase2Config:
        """Return the configuration of a phase: 1.5, Gate A alone, runs on at most ``eval.gate_a_samples`` ON samples."""
        if phase != "1.5":
            return self
        sizes = self.eval.model_copy(update={"on_samples": min(self.eval.on_samples, self.eval.gate_a_samples)})
        return self.model_copy(update={"eval": sizes})

    def kl_limit(self, threshold: str) -> float:
        """Return a threshold for two mathematically identical computations in nats; where it is null, the dtype's limit."""
        value = getattr(self.thresholds, threshold)
        return KL_LIMIT[self.runtime.torch_dtype] if value is None else float(value)

    def difference_limit(self, threshold: str) -> float:
        """Return the limit of a difference of (log-)probabilities or KLs in nats: a KL of d moves them by about sqrt(2 d)."""
        return math.sqrt(2 * self.kl_limit(threshold))

    @property
    def rows_per_pass(self) -> int | None:
        """Largest number of rows in a forward pass; None for as many as fit."""
        return None if self.runtime.batch_size == "auto" else self.runtime.batch_size

    @property
    def shard(self) -> Shard | None:
        """Which part of the run's units is computed; None for all of them."""
        return None if self.runtime.shard is None else Shard.parse(self.runtime.shard)

    def by_key(self) -> dict[str, Any]:
        """Return the resolved configuration as ``{"select.mode": ...}``."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": leaf for key, leaf in value.items()})
            else:
                flat[name] = value
        return flat

    def dotted(self) -> dict[str, Any]:
        """Return the resolved configuration as ``{"phase2.select.mode": ...}``, the names that MLflow has."""
        return {f"phase2.{key}": value for key, value in self.by_key().items()}
