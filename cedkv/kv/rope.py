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
    if not len(rope.inv_freq):
        return keys
    angles = _angles(shift.to(keys.device), rope)[:, None]
    return _turn(keys, angles.cos().float(), angles.sin().float(), rope)


def mean_rotation(positions: torch.Tensor, rope: RopeLayout, dim: int) -> torch.Tensor:
    """Return the mean of the rotations R(p) over positions, (D_h, D_h) float32, to be multiplied from the left.

    Args:
        positions: (P,).
        dim: D_h; dimensions that are not rotated keep a 1 on the diagonal.
    """
    unit = torch.eye(dim, device=positions.device)
    if not len(rope.inv_freq):
        return unit
    angles = _angles(positions, rope)
    cos, sin = (turned.mean(dim=0).float().expand(dim, -1) for turned in (angles.cos(), angles.sin()))
    return _turn(unit, cos, sin, rope).T


def _angles(positions: torch.Tensor, rope: RopeLayout) -> torch.Tensor:
    """Return the angle of every pair at these positions, (..., pairs), in float64 (float32 on mps)."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    return positions.to(dtype)[..., None] * rope.inv_freq.to(positions.device, dtype)


def _turn(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: RopeLayout) -> torch.Tensor:
    """Rotate vectors (..., D_h) by the cosine and sine of every pair."""
    pairs, start = len(rope.inv_freq), rope.start
    rotary = vectors[..., start : start + 2 * pairs].float()
    if rope.layout == "halves":
        first, second = rotary[..., :pairs], rotary[..., pairs:]
    else:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(turned, dim=-1) if rope.layout == "halves" else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat((vectors[..., :start], rotated.to(vectors.dtype), vectors[..., start + 2 * pairs :]), dim=-1)
