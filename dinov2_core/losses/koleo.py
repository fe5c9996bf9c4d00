"""Nearest-neighbour entropy: spreads the cls tokens of a batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.collectives import GlobalRows, gather_rows, world_size
from dinov2_core.losses.precision import without_autocast

EPSILON = 1e-8
MIN_DISTANCE = 1e-6
"""Below it the direction to the neighbour is float32 rounding: such pairs get no gradient."""


Neighbours = Literal["global_batch", "rank"]


def koleo_of_crops(cls_tokens: Tensor, *, neighbours: Neighbours) -> dict[str, Tensor]:
    """Sum over the two global crops, each with neighbours among crops of its own kind.

    Args:
        cls_tokens: Student's cls tokens [2B, D] of the global crops, crop 0 of all images first.
        neighbours: As of `koleo_loss`.

    Returns:
        koleo.
    """
    losses = [koleo_loss(crop, neighbours=neighbours) for crop in cls_tokens.chunk(2)]
    return {"koleo": torch.stack(losses).sum()}


def koleo_loss(features: Tensor, *, neighbours: Neighbours) -> Tensor:
    """Minus the mean log distance to the nearest neighbour, arXiv:1806.03198.

    Features are normalised to length 1 first, in float32. Duplicates cost a finite value and
    get no gradient. With neighbours in the global batch the call is collective, and averaging
    gradients over the ranks gives those of one process that holds all features.

    Args:
        features: Student cls tokens [B, D] of different images, any float dtype.
        neighbours: Among which features the nearest one is searched.

    Returns:
        Scalar float32; 0 with fewer than two features.
    """
    with without_autocast(features.device):
        unit = F.normalize(features.float(), dim=-1, eps=EPSILON)
        num_features = unit.shape[0]
        if neighbours == "rank" or world_size() == 1:
            gathered = GlobalRows(rows=unit, first_row=0)
            share = 1 / max(num_features, 1)
        else:
            gathered = gather_rows(unit)
            share = world_size() / max(gathered.rows.shape[0], 1)
        if gathered.rows.shape[0] < 2:
            return unit.sum() * 0
        neighbour = gathered.rows[_nearest(unit.detach(), gathered=gathered)]
        distance = torch.linalg.vector_norm(unit - neighbour, dim=1)
        loss: Tensor = (distance.clamp(min=MIN_DISTANCE) + EPSILON).log().sum() * -share
        return loss


def _nearest(unit: Tensor, *, gathered: GlobalRows) -> Tensor:
    """Row of the nearest other feature for each of this rank's, [B] int64."""
    similarity = unit @ gathered.rows.detach().T  # [B, B over all ranks]
    own = torch.arange(unit.shape[0], device=unit.device)
    similarity[own, own + gathered.first_row] = -torch.inf
    return similarity.argmax(dim=1)
