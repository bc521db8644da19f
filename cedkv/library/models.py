"""Load a model as the engine does."""

from __future__ import annotations

import os
from typing import Any

from cedkv.checks import certificate
from cedkv.config.resolve import with_values
from cedkv.library.settings import ConfigLike, configuration, keys_of
from cedkv.models import loading
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel

MOVES_KEYS = {"prefix.kv_source": "gather", "injection.positioning_mode": "compact"}
"""A configuration for which every check of a certificate counts: whatever is selected later is covered."""


def load_model(
    model_id: str | os.PathLike[str] | None = None, *, config: ConfigLike = None, certify: bool = False, **settings: Any
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        model_id: hub id, local folder, GGUF file, or ``smollm2-135m``; None for the configuration's (``model.id``).
        config: path of a YAML file, or a configuration, of which ``model`` and ``runtime`` are used.
        certify: check the model against itself, as every run does: this package's numbers against those of the model left
            alone. It takes seconds to minutes, once for these weights, device and versions; the certificate is kept.
        settings: keys of ``model`` and ``runtime`` by their short names (``device``, ``dtype``, ``batch_size``, ...), or in
            full: ``**{"model.cache_dir": ...}``.

    Returns:
        The loaded model; the transformers model is its ``model``, the tokenizer its ``tokenizer``.

    Raises:
        ConfigError: an unknown setting, or a device that is not available.
        ModelError: the model cannot be loaded, or is of a kind that is not supported; no other takes its place. Or it is to be
            certified, and a check failed, whose figures are in the message.
    """
    values = keys_of(settings, "load_model", ("model", "runtime"))
    resolved = configuration(config, values if model_id is None else {**values, "model.id": os.fspath(model_id)})
    lm = loading.load(resolved)
    if certify:
        certificate.ensure_certificate(lm, fingerprint(lm), resolved.model.cache_dir).check([with_values(resolved, MOVES_KEYS)])
    return lm
