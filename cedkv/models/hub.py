"""Models of a hub: a hub id told apart from a path, one commit for all its files, and one wait where the hub is away."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from transformers.utils import cached_file

from cedkv.core.errors import ModelError
from cedkv.models.weight_files import ADAPTER

WAIT = 10.0
"""Seconds that a hub has to answer; transformers by itself waits that long for every file, several times."""
_log = logging.getLogger(__name__)


def check_hub_id(name: str) -> None:
    """Raise if a model id that is no folder cannot be a hub id either.

    Raises:
        ModelError: says which folder is missing.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(
            f"model.id = {name!r}: there is no such folder ({os.path.abspath(os.path.expanduser(name))}), and it is no hub id "
            "(organisation/name). Give a folder that exists (-P model_id=/path/to/folder), one GGUF file, or a hub id"
        ) from None


def reachable_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return options to fetch a hub model with: from the cache alone where the hub is away and the cache has it.

    Args:
        options: ``revision``, and ``cache_dir`` where one is set.

    Raises:
        OSError: the hub does not answer, and the cache does not have the model.
    """
    if constants.HF_HUB_OFFLINE:
        return options
    try:
        url = huggingface_hub.hf_hub_url(name, "config.json", revision=options["revision"])
        huggingface_hub.get_session().head(url, timeout=WAIT)
        return options
    except Exception as error:  # of the HTTP client, which is another one in other versions of huggingface_hub
        reason = f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {error})"
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", **options), str):
            raise OSError(f"{reason}, and the model is not in the cache") from error
        _log.warning("%s: %s is taken from the cache. Set HF_HUB_OFFLINE=1 to start without waiting for the hub", reason, name)
        return {**options, "local_files_only": True}


def snapshot(name: str, options: dict[str, Any]) -> Path:
    """Return the folder in the cache with config.json, and adapter_config.json if there is one, of one commit.

    Args:
        options: as ``reachable_options`` returns them.

    Raises:
        OSError: the hub does not have the model, or cannot be reached.
    """
    folder = Path(str(cached_file(name, "config.json", **options))).parent
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    cached_file(name, ADAPTER, **{**options, "revision": folder.name}, **optional)
    return folder
