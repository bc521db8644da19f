"""Rotary keys, moved to other positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, eq=False)
class RopeLayout:
    """How one layer rotates its keys (Su et al. 2021, RoFormer, eq. 14-16).

    inv_freq: (pairs,) radians a position, the model's own; empty where the layer has no positions; negative: backwards.
    layout: what makes a pair, dimensions i and i + pairs (``halves``) or 2i and 2i + 1 (``neighbours``).
    start: the first dimension that is rotated; those before it and after the last pair stay as they are.
    """

    inv_freq: torch.Tensor
    layout: Literal["halves", "neighbours"] = "halves"
    start: int = 0


def rerotate_keys(keys: torch.Tensor, shift: torch.Tensor, rotation: RopeLayout) -> torch.Tensor:
    """Move rotary keys by ``shift`` positions: R(p + d) k = R(d) R(p) k.

    Args:
        keys: (B, H_kv, K, D_h) already rotated.
        shift: (B, K) positions to move by, new - old; may be negative.
        rotation: the layer's. A constant factor some rope types put on cos and sin is in the keys already, so cos and sin
            are not scaled here.
    """
    pairs, start = len(rotation.inv_freq), rotation.start
    if not pairs:
        return keys
    exact = torch.float32 if keys.device.type == "mps" else torch.float64
    angles = shift.to(keys.device, exact)[:, None, :, None] * rotation.inv_freq.to(keys.device, exact)
    cos, sin = angles.cos().float(), angles.sin().float()
    part = keys[..., start : start + 2 * pairs].float()
    if rotation.layout == "halves":
        first, second = part[..., :pairs], part[..., pairs:]
    else:
        first, second = part[..., 0::2], part[..., 1::2]
    moved = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(moved, dim=-1) if rotation.layout == "halves" else torch.stack(moved, dim=-1).flatten(-2)
    return torch.cat((keys[..., :start], turned.to(keys.dtype), keys[..., start + 2 * pairs :]), dim=-1)
