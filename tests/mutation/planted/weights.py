"""Faults in how a checkpoint is read."""

from __future__ import annotations

from typing import Any

from tests.mutation.planted import Patch
from tests.support import patch_points as points


def a_layer_left_out(patch: Patch) -> None:
    """The last layer is lost from the configuration as it is read; model and suite agree on the shorter model."""

    def shorter(real: Any, *arguments: Any, **named: Any) -> Any:
        content, rest = real(*arguments, **named)
        return {**content, "num_hidden_layers": content["num_hidden_layers"] - 1}, rest

    points.CONFIG_CONTENT.wrap(patch, shorter)
