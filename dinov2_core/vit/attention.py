"""Self-attention over a packed sequence of crops of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PLAIN_SCORES = 1 << 26
"""Attention scores that may be held at once, 128 MiB in bfloat16."""


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


def attend(qkv: Tensor, *, groups: Sequence[CropGroup], num_heads: int) -> Tensor:
    """Scaled dot-product attention of every crop with itself.

    Crops of a group have equal length, so that no mask is needed: the result equals
    block-diagonal attention over the packed sequence. The one place that chooses a kernel.

    Args:
        qkv: Queries, keys and values of the packed tokens [T, 3 D], head-major.
        groups: How the T rows fall into crops, in order.
        num_heads: Attention heads, divides D.

    Returns:
        Attended values [T, D] in the order of the rows.
    """
    attended = []
    for rows, group in zip(split_rows(qkv, groups=groups), groups, strict=True):
        heads = rows.view(group.num_crops, group.num_tokens, 3, num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [crops, heads, tokens, d]
        values = _attended(query, key, value)
        attended.append(values.transpose(1, 2).reshape(group.num_rows, -1))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of queries, keys and values [crops, heads, tokens, d].

    The fused kernel's backward pass in bfloat16 on a CPU takes about ten times as long as two
    matrix products and a softmax, which are taken while their scores fit.
    """
    num_scores = query.shape[:-1].numel() * key.shape[-2]
    is_cpu_bf16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if is_cpu_bf16 and num_scores <= MAX_PLAIN_SCORES:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return torch.softmax(scores, dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, *, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; "
                f"choose a number of heads that divides {embed_dim}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """Packed tokens [T, D] to packed tokens [T, D]."""
        attended = attend(self.qkv(tokens), groups=groups, num_heads=self.num_heads)
        projected: Tensor = self.proj(attended)
        return projected
