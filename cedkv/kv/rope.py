"""Rotary position embeddings (RoPE): move keys that are already rotated to other positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, eq=False)
class RopeLayout:
    """How one layer rotates its keys (Su et al. 2021, RoFormer, eq. 14-16).

    inv_freq: (pairs,) radians per position, the model's own; empty where the layer has no positions; negative: backwards.
    layout: which dimensions form a pair: i and i + pairs (``halves``), or 2i and 2i + 1 (``neighbours``).
    start: the first rotated dimension; dimensions before it and after the last pair are left unchanged.
    """

    inv_freq: torch.Tensor
    layout: Literal["halves", "neighbours"] = "halves"
    start: int = 0


def rerotate_keys(keys: torch.Tensor, shift: torch.Tensor, rope: RopeLayout) -> torch.Tensor:
    """Move rotary keys by ``shift`` positions: R(p + d) k = R(d) R(p) k (Su et al. 2021, RoFormer, eq. 14-16).

    Args:
        keys: (B, H_kv, K, D_h), already rotated.
        shift: (B, K) positions to move by, new - old; may be negative.
        rope: the layer's rotation. Some rope types scale cos and sin by a constant; the keys hold that factor already, so
            cos and sin are not scaled here.

    Returns:
        Keys at their new positions, same shape and dtype. Angles are computed in float64 (float32 on mps).
    """
    pairs, start = len(rope.inv_freq), rope.start
    if not pairs:
        return keys
    angle_dtype = torch.float32 if keys.device.type == "mps" else torch.float64
    angles = shift.to(keys.device, angle_dtype)[:, None, :, None] * rope.inv_freq.to(keys.device, angle_dtype)
    cos, sin = angles.cos().float(), angles.sin().float()
    rotary = keys[..., start : start + 2 * pairs].float()
    if rope.layout == "halves":
        first, second = rotary[..., :pairs], rotary[..., pairs:]
    else:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(turned, dim=-1) if rope.layout == "halves" else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat((keys[..., :start], rotated.to(keys.dtype), keys[..., start + 2 * pairs :]), dim=-1)
