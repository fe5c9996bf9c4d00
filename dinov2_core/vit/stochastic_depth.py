"""Stochastic depth that computes a residual branch for a subset of the crops only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dinov2_core.vit.packing import CropGroup, split_rows


class Branch(Protocol):
    """Maps packed tokens [T, D] to a residual [T, D]."""

    def __call__(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """The residual of tokens that fall into these groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCrops:
    """Crops of the packed sequence that one residual branch computes."""

    groups: tuple[CropGroup, ...]
    """The kept crops, group by group."""
    rows: tuple[Tensor, ...]
    """Per group, the rows of the kept crops in the whole packed sequence, int64."""
    scales: tuple[float, ...]
    """Per group, number of crops / number of kept crops."""


def keep_crops(groups: Sequence[CropGroup], *, drop_rate: float, device: torch.device) -> KeptCrops:
    """Draw the crops that a residual branch computes.

    One permutation per group, in order, from the default generator of the device; at least one
    crop of a group is kept. arXiv:2304.07193, section 5 (efficient stochastic depth).

    Args:
        groups: How the packed sequence falls into crops.
        drop_rate: Share of crops that skip the branch, in [0, 1).
        device: Where the permutations are drawn.

    Returns:
        The kept crops with their rows and scales.
    """
    kept_groups, rows, scales, first_row = [], [], [], 0
    for group in groups:
        num_kept = max(int(group.num_crops * (1 - drop_rate)), 1)
        crops = torch.randperm(group.num_crops, device=device)[:num_kept]
        tokens = torch.arange(group.num_tokens, device=device)
        rows.append((first_row + crops[:, None] * group.num_tokens + tokens).flatten())
        kept_groups.append(CropGroup(num_crops=num_kept, num_tokens=group.num_tokens))
        scales.append(group.num_crops / num_kept)
        first_row += group.num_rows
    return KeptCrops(groups=tuple(kept_groups), rows=tuple(rows), scales=tuple(scales))


def add_residual(
    tokens: Tensor,
    *,
    branch: Branch,
    groups: Sequence[CropGroup],
    drop_rate: float,
) -> Tensor:
    """Add a residual branch, computed for all crops or for a random subset.

    Args:
        tokens: Packed tokens [T, D].
        branch: Maps packed tokens and their groups to a residual of the same shape.
        groups: How the T rows fall into crops.
        drop_rate: Share of crops that skip the branch; 0 computes all and draws nothing.

    Returns:
        Packed tokens [T, D]; the kept residuals are scaled so that the expectation stays.
    """
    if drop_rate == 0:
        return tokens + branch(tokens, groups=groups)
    kept = keep_crops(groups, drop_rate=drop_rate, device=tokens.device)
    residual = branch(tokens.index_select(0, torch.cat(kept.rows)), groups=kept.groups)
    summed = tokens.clone()
    parts = split_rows(residual, groups=kept.groups)
    for rows, part, scale in zip(kept.rows, parts, kept.scales, strict=True):
        summed.index_add_(0, rows, part.to(summed.dtype), alpha=scale)
    return summed
