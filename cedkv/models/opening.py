"""Open a model without its weights: where it is, its configuration and its tokenizer; what these rule out is rejected here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError, ModelError
from cedkv.kv import attention
from cedkv.models import gguf_model, hub, smollm2
from cedkv.models.capabilities import Capabilities, check_supported, read_capabilities
from cedkv.models.checkpoint import check_own_code, check_pinned, local_folder
from cedkv.models.config_file import check_config, defaults_taken
from cedkv.models.devices import pick_device
from cedkv.models.gguf_file import gguf_path
from cedkv.models.load_errors import explain_load_errors
from cedkv.models.tokenizer import check_probeable, load_tokenizer
from cedkv.models.weight_files import check_adapter


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights.

    source: hub id or folder.
    options: keyword arguments of ``from_pretrained``; the revision of a hub model is its commit.
    folder: the folder that holds config.json; of a hub model its snapshot in the cache.
    skeleton: the model on torch's meta device, which holds no numbers; its ``config`` is the configuration.
    vocabulary: number of tokens in the model's vocabulary.
    quantised: the method by which the weights are quantised; None if they are not.
    notes: what its configuration leaves to defaults that no weight shows.
    gguf: the GGUF file that the model comes from; None for others.
    """

    source: str
    options: dict[str, Any]
    folder: Path
    device: torch.device
    capabilities: Capabilities
    tokenizer: Any
    skeleton: Any
    vocabulary: int
    quantised: str | None
    notes: tuple[str, ...] = ()
    gguf: Path | None = None


def open_spec(config: Phase2Config, anywhere: bool = False) -> ModelSpec:
    """Find a model, read its configuration and tokenizer, and reject what these rule out.

    Args:
        anywhere: whether the device that the configuration names may be one of another machine.

    Raises:
        ModelError: the model cannot be loaded, or does not support the configuration.
        ConfigError: the device is not available, or ``model.revision`` does not apply.
    """
    device = pick_device(config.runtime.device, anywhere)
    name = config.model.id
    gguf = None if name == smollm2.NAME else gguf_path(name)
    local = local_folder(config.model)
    options: dict[str, Any] = {"revision": config.model.revision or "main"}
    if name == smollm2.NAME or gguf is not None:
        _reject_hub_settings(config)
        cache_dir = config.model.cache_dir
        local = smollm2.folder(cache_dir) if gguf is None else gguf_model.tokenizer_folder(gguf, cache_dir)
    elif local is None:
        hub.check_hub_id(name)
        if config.model.cache_dir:
            options["cache_dir"] = config.model.cache_dir
    if local is not None:
        _reject_revision(config)
    check_pinned(config.model, local)
    if local is None:
        with explain_load_errors(name, None, f"revision {options['revision']!r} of it cannot be fetched"):
            options = hub.reachable_options(name, options)
            folder = hub.snapshot(name, options)
            options["revision"] = folder.name
    else:
        folder = local
    content = check_config(folder)
    check_adapter(folder)
    check_own_code(config.model, content)
    source = name if local is None else str(local)
    hub_options, trusted = dict(options), {"trust_remote_code": config.model.trust_remote_code}
    with explain_load_errors(name, local, "its configuration cannot be read"):
        hf_config = AutoConfig.from_pretrained(source, **options, **trusted)
    read_capabilities(hf_config)
    with explain_load_errors(name, local, "its quantization_config cannot be read"):
        method = _quantisation(hf_config)
    with explain_load_errors(name, local, "no model can be made of its configuration"):
        skeleton = _without_numbers(hf_config, trusted)
    capabilities = read_capabilities(hf_config)  # of the configuration as the model itself completes it
    check_supported(capabilities, config)
    vocabulary = int(hf_config.vocab_size)
    with explain_load_errors(name, local, "its tokenizer cannot be read"):
        tokenizer = load_tokenizer(source, hub_options, vocabulary, config.model.chat_template)
    check_probeable(tokenizer, vocabulary)
    if gguf is not None:
        gguf_model.check_tokenizer(gguf, folder, tokenizer)
    notes = tuple(defaults_taken(content, hf_config))
    return ModelSpec(
        source, {**options, **trusted}, folder, device, capabilities, tokenizer, skeleton, vocabulary, method, notes, gguf
    )


def _without_numbers(hf_config: Any, trusted: dict[str, Any]) -> Any:
    """Return the model of a configuration on torch's meta device: its modules, and the shapes of its weights.

    The configuration is completed in place, as the model of it will have it. What it says of single calls (attention
    implementation, form of the output) is replaced: every call here says it.
    """
    hf_config._attn_implementation = attention.register()
    hf_config.return_dict, hf_config.output_hidden_states, hf_config.output_attentions = True, False, False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, **trusted)


def _reject_hub_settings(config: Phase2Config) -> None:
    """Raise if settings that only a hub model, or code beside a model, gives a meaning are set for a model without either."""
    name = config.model.id
    _reject_revision(config)
    if config.model.trust_remote_code:
        raise ConfigError(f"model.trust_remote_code = true: {name} brings no code; leave it false")


def _reject_revision(config: Phase2Config) -> None:
    """Raise if a revision is set for a model that has none: nothing would be of that revision, and the run would say it is."""
    name, revision = config.model.id, config.model.revision
    if revision is not None:
        raise ConfigError(f"model.revision = {revision!r}: {name} has no revisions, as a hub model has; leave it null")


def _quantisation(hf_config: Any) -> str | None:
    """Return the method by which a checkpoint says its weights are quantised; None if they are not.

    Raises:
        ModelError: transformers does not know the method.
        Exception: what transformers raises about settings that it cannot read.
    """
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    if not AutoHfQuantizer.supports_quant_method(values):
        raise ModelError(
            f"the model is quantised by {values['quant_method']!r}, which transformers {transformers.__version__} does not "
            "know: it would read the packed numbers as weights. Install a version that does, or take one that is not quantised"
        )
    return str(values["quant_method"])
