"""Crops of different sizes in one packed sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CropGroup:
    """Crops of one size, lying one after the other in the packed sequence."""

    num_crops: int
    """Crops of the group."""
    num_tokens: int
    """Tokens of each crop: cls, registers and patches."""

    @property
    def num_rows(self) -> int:
        """Rows of the packed sequence that the group takes."""
        return self.num_crops * self.num_tokens


def split_rows(rows: Tensor, *, groups: Sequence[CropGroup]) -> tuple[Tensor, ...]:
    """Packed rows [T, ..] group by group, as views."""
    return torch.split(rows, [group.num_rows for group in groups])
