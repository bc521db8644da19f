"""The phase2 configuration: one schema, from which files, overrides and flags are read and checked.

Order of precedence: defaults below < YAML file < ``set`` overrides < named options. The defaults are those of
``configs/phase2.yaml`` (a test keeps them equal). Values are immutable once resolved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cedkv.config.extensions import KV_SOURCES, PADDING, POSITIONING, SELECTORS, TASKS
from cedkv.core.errors import ConfigError
from cedkv.core.registry import Registry, build
from cedkv.core.text import escape_control, redact


def _plain(text: str) -> str:
    if escape_control(text) != text or "\n" in text:
        raise PydanticCustomError("hidden", "text must hold no control or direction characters; remove them")
    if redact(text) != text:
        raise PydanticCustomError(
            "secret", "it holds credentials, and a configuration is stored with every run; give them by environment (HF_TOKEN)"
        )
    return text


def _name_in(registry: Registry[Any]) -> Callable[[str], str]:
    """Return a validator: the name is in a registry."""

    def check(name: str) -> str:
        try:
            return registry.check(name)
        except ConfigError as error:
            raise PydanticCustomError("not_registered", "{reason}", {"reason": str(error)}) from None

    return check


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_plain)]
SelectorName = Annotated[str, AfterValidator(_name_in(SELECTORS))]
TaskName = Annotated[str, AfterValidator(_name_in(TASKS))]
PositioningName = Annotated[str, AfterValidator(_name_in(POSITIONING))]
PaddingName = Annotated[str, AfterValidator(_name_in(PADDING))]
KVSourceName = Annotated[str, AfterValidator(_name_in(KV_SOURCES))]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Limit = Annotated[float, Field(ge=0)]
LayerScope = (
    Annotated[str, Field(pattern=r"^(all|top([1-9]\d?|100))$")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
)
Dtype = Literal["float32", "bfloat16", "float16"]

KL_LIMIT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Limit in nats for two computations that are equal on paper, by dtype; used where a threshold is left null.

Seen on a 135M Llama: 1e-7 in float32, 3e-3 in bfloat16. The limits stand well above what rounding does and far below
what a wrong position or a wrong mask does (1e-2 and more in float32). For relative errors of keys the same numbers serve:
rounding makes them 6 units of the dtype at most, 0.047 in bfloat16 and 0.006 in float16 (``plumbing.rotation_equivariance``).
"""


class Block(BaseModel):
    """Common rules of every configuration block: immutable, strictly typed, finite, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelBlock(Block):
    id: Text = "Qwen/Qwen2.5-1.5B-Instruct"
    revision: Text | None = None
    cache_dir: Text | None = None
    chat_template: bool = True
    allow_uncertified: bool = False
    trust_remote_code: bool = False


class RuntimeBlock(Block):
    backend: Literal["hf"] = "hf"
    allow_mock_fallback: bool = False
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    device_map: Literal["auto"] | None = None
    torch_dtype: Dtype = "float32"
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    fail_on_gate: bool = False
    mlflow_timeout: Annotated[int, Field(ge=4, le=3600)] = 60

    @model_validator(mode="after")
    def _strict(self) -> Self:
        if self.allow_mock_fallback:
            raise ValueError(
                "runtime.allow_mock_fallback = true is refused: a verdict on a mock says nothing about a model, so the "
                "suite runs on real weights or not at all; leave it false"
            )
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"runtime.device_map = {self.device_map} spreads the model over all devices, and runtime.device = "
                f"{self.device} names one; leave one of them out"
            )
        return self


class EvalBlock(Block):
    on_samples: Count = 64
    off_samples: Count = 128
    repro_runs: Annotated[int, Field(ge=2, le=100)] = 2
    n_random_trials: Annotated[int, Field(ge=1, le=1000)] = 5
    decoding: Literal["greedy"] = "greedy"
    gate_a_samples: Count = 16


class PrefixBlock(Block):
    padding_mode: PaddingName = "null_pad"
    kv_source: KVSourceName = "prefill"


class InjectionBlock(Block):
    positioning_mode: PositioningName = "compact"


class SelectBlock(Block):
    mode: SelectorName = "attention_diversity_span"
    params: dict[str, bool | int | float | str] = {}
    span_len: Count = 8
    span_budget: Count = 4
    min_span_distance: Annotated[int, Field(ge=1)] = 8
    candidate_policy: Literal["input_and_delimiter_only"] = "input_and_delimiter_only"
    center_policy: Literal["start", "center"] = "start"
    keep_sink: Annotated[int, Field(ge=0)] = 0
    query_window: Count = 1
    causal_drop_advisory: bool = False

    @model_validator(mode="after")
    def _params_fit(self) -> Self:
        if self.params or self.mode not in SELECTORS.builtin:  # built-in ones have defaults, and importing them takes time
            try:
                build(SELECTORS.get(self.mode), self.params, "select.params")
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self


class LayerScopeBlock(Block):
    selection: LayerScope = "top25"
    injection: LayerScope = "all"


class ThresholdsBlock(Block):
    on_gain_min: float = 0.10
    off_delta_p99_max: Limit = 1.0
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
    topk_tokens: Annotated[int, Field(ge=1, le=100)] = 5


class DataBlock(Block):
    on_path: Text | None = None
    off_path: Text | None = None
    task: TaskName = "symbol_lookup"
    pairs: Annotated[int, Field(ge=2, le=12)] = 8

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.on_path is not None and self.task != "symbol_lookup":
            raise ValueError(
                f"data.task = {self.task} generates ON episodes and data.on_path = {self.on_path} names a file of them; leave "
                "one of the two out"
            )
        return self


class Phase2Config(Block):
    """Everything one run depends on."""

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
    def _fits(self) -> Self:
        need = self.select.span_budget * self.select.span_len + self.select.keep_sink
        if need > self.prefix_len:
            raise ValueError(
                f"select.span_budget x select.span_len + select.keep_sink = {self.select.span_budget} x "
                f"{self.select.span_len} + {self.select.keep_sink} = {need} tokens cannot fit prefix_len = "
                f"{self.prefix_len}: raise prefix_len to {need} or more, or lower span_budget, span_len or keep_sink"
            )
        return self

    def for_phase(self, phase: str) -> Phase2Config:
        """What a phase runs: 1.5 is Gate A alone, on ``eval.gate_a_samples`` ON samples."""
        if phase != "1.5":
            return self
        sizes = self.eval.model_copy(update={"on_samples": min(self.eval.on_samples, self.eval.gate_a_samples)})
        return self.model_copy(update={"eval": sizes})

    def kl_limit(self, threshold: str) -> float:
        """The limit of a check whose two sides are equal on paper: the threshold, or the dtype's limit if null."""
        value = getattr(self.thresholds, threshold)
        return KL_LIMIT[self.runtime.torch_dtype] if value is None else float(value)

    @property
    def rows_per_pass(self) -> int | None:
        """Rows in a forward pass at most; None for as many as fit."""
        return None if self.runtime.batch_size == "auto" else self.runtime.batch_size

    def dotted(self) -> dict[str, Any]:
        """The resolved configuration as ``{"phase2.select.mode": ...}``."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            if isinstance(value, dict):
                flat.update({f"phase2.{name}.{key}": leaf for key, leaf in value.items()})
            else:
                flat[f"phase2.{name}"] = value
        return flat
