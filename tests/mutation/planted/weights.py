"""Faults in how a checkpoint is read."""

from __future__ import annotations

from typing import Any

import torch

from tests.mutation.planted import Patch
from tests.support import patch_points as points


def a_layer_left_out(patch: Patch) -> None:
    """The last layer is lost from the configuration as it is read; model and suite agree on the shorter model."""

    def shorter(real: Any, *arguments: Any, **named: Any) -> Any:
        content, rest = real(*arguments, **named)
        return {**content, "num_hidden_layers": content["num_hidden_layers"] - 1}, rest

    points.CONFIG_CONTENT.wrap(patch, shorter)


def a_layer_read_as_zeros(patch: Patch) -> None:
    """One matrix of the second layer stays empty, as where a file was fetched in part; both sides compute with it."""

    def empty(real: Any, *arguments: Any, **named: Any) -> Any:
        lm = real(*arguments, **named)
        with torch.no_grad():
            lm.model.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()
        return lm

    points.LOAD_MODEL.wrap(patch, empty)
