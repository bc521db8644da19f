"""Load a model from a hub id, a folder, a GGUF file or as ``smollm2-135m``; what cannot be loaded is never replaced."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core import threads
from cedkv.core.errors import ModelError
from cedkv.core.version import __version__
from cedkv.kv import attention
from cedkv.kv.positioning import moves_cached_keys
from cedkv.kv.rope import RopeLayout
from cedkv.models import cpu, gguf_model
from cedkv.models.batching import Batching
from cedkv.models.capabilities import Capabilities, scope_layers, unsupported_error
from cedkv.models.checkpoint import trusted_code
from cedkv.models.devices import device_map, sum_dtype, to_device, use_exact_float32
from cedkv.models.load_errors import explain_load_errors, explain_quantisation_errors
from cedkv.models.opening import ModelSpec, open_spec
from cedkv.models.rope_detection import detect_rope_layouts
from cedkv.models.weight_files import check_weights
from cedkv.tasks.tokenize import bos_put_by


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model and everything that scoring needs to know about it.

    Attributes:
        device: the device of the model's inputs.
        rope_layouts: each layer's rotation of keys; None where keys cannot be moved.
        meta: facts for the report and the fingerprint.
        measured: what was measured on the model once and is kept for its next use.
    """

    model: Any
    tokenizer: Any
    capabilities: Capabilities
    device: torch.device
    batching: Batching
    rope_layouts: tuple[RopeLayout, ...] | None
    meta: dict[str, Any]
    measured: dict[Any, Any] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the model's vocabulary."""
        return int(self.model.config.vocab_size)

    def selection_layers(self, scope: str | Sequence[int]) -> frozenset[int]:
        """Return the layers whose attention scores a demo."""
        return scope_layers(scope, self.capabilities.n_layers, "layer_scope.selection")

    def injection_layers(self, scope: str | list[int]) -> frozenset[int] | None:
        """Return the layers that see the prefix; None for all layers, which needs no hiding."""
        layers = scope_layers(scope, self.capabilities.n_layers, "layer_scope.injection")
        return None if len(layers) == self.capabilities.n_layers else layers


def load(config: Phase2Config, spec: ModelSpec | None = None) -> LanguageModel:
    """Load a model's weights, and set torch's number of threads where the configuration has one.

    Args:
        spec: the result of ``open_spec``; None to open the model first.

    Raises:
        ModelError: the model cannot be loaded, its weights do not fit its configuration, or it does not support the run's.
        ConfigError: the device is not available.
    """
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    spec = spec or open_spec(config)
    use_exact_float32(spec.device, config.runtime.torch_dtype)
    name, capabilities, tokenizer = config.model.id, spec.capabilities, spec.tokenizer
    folder = spec.folder if spec.gguf is None else gguf_model.model_folder(spec.gguf, config.model.cache_dir)
    source = spec.source if spec.gguf is None else str(folder)
    local = Path(source) if Path(source).is_dir() else None
    hf_config = spec.skeleton.config
    mapping = device_map(config.runtime, spec.device, spec.quantised is not None)
    with (
        explain_load_errors(name, local, "its weights cannot be loaded"),
        explain_quantisation_errors(name, spec.quantised),
        _complete_weights(folder, local is None, spec.skeleton),
    ):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            **spec.options,
            config=hf_config,
            device_map=mapping,
            dtype=getattr(torch, config.runtime.torch_dtype),
            attn_implementation=attention.register(),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below, with their names
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(
            f"{name}: the checkpoint does not fit its config.json: {sorted(info['missing_keys'])[:3]} are missing, "
            f"{sorted(map(str, info['mismatched_keys']))[:3]} have another shape; they would be random numbers"
        )
    _check_dtypes(name, model, config.runtime.torch_dtype, spec.quantised)
    device = to_device(model.eval(), spec.device, mapping is not None)
    if device.type == "cpu":
        cpu.keep_freed_memory()
    onednn = cpu.use_onednn(model)
    rope_layouts = None
    if capabilities.positions == "rotary":
        rope_layouts = detect_rope_layouts(model, device, capabilities.max_positions, KL_LIMIT[config.runtime.torch_dtype])
    lm = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        capabilities=capabilities,
        device=device,
        batching=Batching(config.rows_per_pass, device),
        rope_layouts=rope_layouts,
        meta={
            **_meta(config, spec, model, device),
            "gguf": None if spec.gguf is None else {"file": spec.gguf.name, **gguf_model.facts_of(Path(source))},
            "matmul": "onednn" if onednn else "torch",
            "weights_without_place": sorted(info["unexpected_keys"]),
        },
    )
    check_loaded(lm, config)
    return lm


@contextmanager
def _complete_weights(folder: Path, fetched: bool, skeleton: Any) -> Iterator[None]:
    """Check weight files around their loading: before, or, where loading fetches them, as soon as they are there."""
    expected = getattr(skeleton.config, "transformers_weights", None), skeleton.base_model_prefix
    if not fetched:
        check_weights(folder, *expected)
    try:
        yield
    finally:
        if fetched and any(folder.glob("*.safetensors")):
            check_weights(folder, *expected)


def _check_dtypes(name: str, model: Any, wanted: str, method: str | None) -> None:
    """Raise if weights have a dtype that is neither the one asked for, nor float32, nor a packed one of quantised weights.

    Raises:
        ModelError: names a weight, and the dtype that the model can be loaded in.
    """
    for weight, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        packed = parameter.dtype.itemsize == 1 or not parameter.dtype.is_floating_point
        if dtype in (wanted, "float32") or (packed and method is not None):
            continue
        how = f"quantised ({method}) and unpacked to that dtype here" if method is not None else "not marked as quantised"
        remedy = "Take a model that is not quantised" + ("" if packed else f", or set runtime.torch_dtype={dtype}")
        raise ModelError(
            f"model {name!r}: {weight} is {dtype} after loading, and runtime.torch_dtype = {wanted}: the model is {how}, and "
            f"would compute in two dtypes. {remedy}"
        )


def _tied(model: Any) -> Iterator[str]:
    """Yield what to state where the configuration ties the output projection to the embedding, and the weights do not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        yield "config.json ties lm_head to the embedding (tie_word_embeddings); the weights have another one, which is used"


def fetch_weights(config: Phase2Config, spec: ModelSpec) -> bool:
    """Put a model's weights on this machine's disk without loading them, so that processes that load them need no network.

    Returns:
        True if the model is a hub's: it can be loaded with HF_HUB_OFFLINE=1 from now on.

    Raises:
        ModelError: the weights cannot be had.
    """
    if spec.gguf is not None:
        gguf_model.model_folder(spec.gguf, config.model.cache_dir)
    if os.path.isdir(spec.source):
        return False
    hub_options = {name: value for name, value in spec.options.items() if name != "trust_remote_code"}
    with explain_load_errors(config.model.id, None, "its weights cannot be fetched"):
        index = cached_file(spec.source, SAFE_WEIGHTS_INDEX_NAME, **hub_options, _raise_exceptions_for_missing_entries=False)
        if index is None:
            cached_file(spec.source, SAFE_WEIGHTS_NAME, **hub_options)
        else:
            get_checkpoint_shard_files(spec.source, index, **hub_options)
    return True


def check_loaded(lm: LanguageModel, config: Phase2Config) -> None:
    """Raise if only the loaded model shows that it does not support the configuration.

    Raises:
        ModelError: keys have to move, and the model rotates them in no way known here.
    """
    kv_source, positioning = config.prefix.kv_source, config.injection.positioning_mode
    if lm.rope_layouts is None and moves_cached_keys(kv_source, positioning):
        reason = "it moves keys to other positions, and the keys of this model did not follow any rotation known here"
        raise unsupported_error(lm.capabilities, kv_source, positioning, reason)


def _meta(config: Phase2Config, spec: ModelSpec, model: Any, device: torch.device) -> dict[str, Any]:
    tokenizer = spec.tokenizer
    dtypes = Counter(str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters())
    return {
        "model_id": config.model.id,
        "model_revision": config.model.revision,
        "model_commit": None if Path(spec.source).is_dir() else spec.options["revision"],
        "trust_remote_code": trusted_code(config.model) or False,
        "quantisation": spec.quantised,
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameter_dtypes": dict(dtypes),
        "config_notes": [*spec.notes, *_tied(model)],
        "layers": model.config.num_hidden_layers,
        "query_heads": model.config.num_attention_heads,
        "kv_heads": getattr(model.config, "num_key_value_heads", model.config.num_attention_heads),
        "vocabulary": model.config.vocab_size,
        "rope_parameters": dict(getattr(model.config, "rope_parameters", None) or {}),
        "tokenizer_class": type(tokenizer).__name__,
        "tokenizer_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "bos_put_by": bos_put_by(tokenizer, config.model.template_kwargs),
        "chat_template": bool(tokenizer.chat_template),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "device_map": {module: str(target) for module, target in getattr(model, "hf_device_map", {}).items()},
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.processor(),
        "attention": f"{attention.NAME} (sdpa)",
        "distributions": str(sum_dtype(device)).removeprefix("torch."),
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "torch_threads": torch.get_num_threads(),
        **threads.in_force(),
        "versions": {
            "cedkv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
