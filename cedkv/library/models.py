"""Load a model as the engine does."""

from __future__ import annotations

import os
from typing import Any

from cedkv.library.settings import ConfigLike, configuration, keys_of
from cedkv.models import loading
from cedkv.models.loading import LanguageModel


def load_model(model_id: str | os.PathLike[str] | None = None, *, config: ConfigLike = None, **settings: Any) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        model_id: hub id, local folder, GGUF file, or ``smollm2-135m``; None for the configuration's (``model.id``).
        config: path of a YAML file, or a configuration, of which ``model`` and ``runtime`` are used.
        settings: keys of ``model`` and ``runtime`` by their short names (``device``, ``dtype``, ``batch_size``, ...), or in
            full: ``**{"model.cache_dir": ...}``.

    Returns:
        The loaded model; the transformers model is its ``model``, the tokenizer its ``tokenizer``.

    Raises:
        ConfigError: an unknown setting, or a device that is not available.
        ModelError: the model cannot be loaded, or is of a kind that is not supported; no other takes its place.
    """
    values = keys_of(settings, "load_model", ("model", "runtime"))
    return loading.load(configuration(config, values if model_id is None else {**values, "model.id": os.fspath(model_id)}))
