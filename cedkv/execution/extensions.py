"""Extensions that a workload is computed with, and what a worker process has to import to have them."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.checks.base import CHECKS, check_providers
from cedkv.config.extensions import REGISTRIES, providers
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview


def provided(configs: Sequence[Phase2Config]) -> dict[str, str]:
    """Return who provides everything that is not built in: ``extension.<key>`` -> ``distribution version``.

    Raises:
        ConfigError: an extension cannot be imported here.
    """
    found = check_providers()
    for config in configs:
        found |= providers(config.by_key())
    return found


def modules_to_import(configs: Sequence[Phase2Config]) -> list[str]:
    """Return the modules whose import registers what these configurations name; entry points and references need none.

    Raises:
        ConfigError: something is defined in the script or notebook that runs, which no other process can import.
    """
    named = [(registry, str(config.by_key()[key])) for config in configs for key, registry in REGISTRIES.items()]
    named += [(CHECKS, name) for name in CHECKS.external()]
    modules = {name: (registry.kind, registry.module_to_import(name)) for registry, name in named}
    for name, (kind, module) in modules.items():
        if module == "__main__":
            raise ConfigError(
                f"{kind} {preview(name)} is defined in the script or notebook that runs, which workers cannot import "
                "(runtime.workers): define it in a module of its own (a file on PYTHONPATH), and import that"
            )
    return sorted({module for _, module in modules.values() if module is not None})
