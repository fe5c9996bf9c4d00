"""Learned positions and their resampling to another grid of patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.vit.patch_embed import PatchGrid


def resample_positions(
    positions: Tensor, *, grid: PatchGrid, offset: float, antialias: bool
) -> Tensor:
    """Resample learned positions to a grid of patches, bicubic in float32.

    Args:
        positions: Learned positions [1, 1 + M * M, D], the cls token's first.
        grid: Patches of the images; the same object comes back when it is M x M.
        offset: Patches added to each side of the grid when the scale factor is computed, which
            shifts the sampling grid a little; the first DINOv2 release used 0.1. 0 samples by
            size. No unit.
        antialias: Low-pass filter when the grid shrinks; the registers release does.

    Returns:
        Positions [1, 1 + N, D] of the dtype given.
    """
    side = math.isqrt(positions.shape[1] - 1)
    assert side * side == positions.shape[1] - 1, positions.shape
    if grid.height == side and grid.width == side:
        return positions
    square = positions[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = ((grid.height + offset) / side, (grid.width + offset) / side)
        resampled = F.interpolate(square, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        size = (grid.height, grid.width)
        resampled = F.interpolate(square, size=size, mode="bicubic", antialias=antialias)
    if resampled.shape[-2:] != (grid.height, grid.width):
        raise ValueError(
            f"position_offset {offset} turns a grid of {grid.height} x {grid.width} patches into "
            f"{resampled.shape[-2]} x {resampled.shape[-1]}; choose an offset in [0, 1)"
        )
    patches = resampled.permute(0, 2, 3, 1).flatten(1, 2)  # [1, N, D]
    return torch.cat([positions[:, :1], patches.to(positions.dtype)], dim=1)
