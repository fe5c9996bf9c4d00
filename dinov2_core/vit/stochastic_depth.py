"""Stochastic depth that computes a residual branch for a subset of the crops only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dinov2_core.vit.packing import CropGroup, split_rows


class Branch(Protocol):
    """Maps packed tokens [T, D] to a residual [T, D]."""

    def __call__(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """The residual of tokens that fall into these groups."""


def add_residual(
    tokens: Tensor,
    *,
    branch: Branch,
    groups: Sequence[CropGroup],
    drop_rate: float,
) -> Tensor:
    """Add a residual branch, computed for all crops or for a random subset.

    The subset is drawn with one permutation per group, in order, from the default generator of the
    device; at least one crop of a group is kept. arXiv:2304.07193, section 5 (efficient stochastic
    depth).

    Args:
        tokens: Packed tokens [T, D].
        branch: Maps packed tokens and their groups to a residual of the same shape.
        groups: How the T rows fall into crops.
        drop_rate: Share of crops that skip the branch, in [0, 1); 0 computes all, draws nothing.

    Returns:
        Packed tokens [T, D]; the kept residuals are scaled so that the expectation stays.
    """
    if drop_rate == 0:
        return tokens + branch(tokens, groups=groups)
    kept, rows, first_row = [], [], 0
    for group in groups:
        num_kept = max(int(group.num_crops * (1 - drop_rate)), 1)
        crops = torch.randperm(group.num_crops, device=tokens.device)[:num_kept]
        within = torch.arange(group.num_tokens, device=tokens.device)
        rows.append((first_row + crops[:, None] * group.num_tokens + within).flatten())
        kept.append(CropGroup(num_crops=num_kept, num_tokens=group.num_tokens))
        first_row += group.num_rows
    residual = branch(tokens.index_select(0, torch.cat(rows)), groups=tuple(kept))
    summed = tokens.clone()
    parts = split_rows(residual, groups=kept)
    for group, own, group_rows, part in zip(groups, kept, rows, parts, strict=True):
        scale = group.num_crops / own.num_crops
        summed.index_add_(0, group_rows, part.to(summed.dtype), alpha=scale)
    return summed
