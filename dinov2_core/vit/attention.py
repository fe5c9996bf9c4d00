"""Self-attention over a packed sequence of crops of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_core.device_kind import device_kind
from dinov2_core.vit.packing import CropGroup, split_rows

MAX_PLAIN_SCORES = 1 << 26
"""Attention scores that may be held at once, 128 MiB in bfloat16."""


class Attend(Protocol):
    """Queries, keys and values [T, 3, heads, d] of packed crops to attended values [T, D]."""

    def __call__(self, qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """Scaled dot-product attention of every crop with itself."""


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    The attribute `attend` computes it: `attend_per_group`, which runs everywhere, or one of
    `attention_kernels`.
    """

    def __init__(self, *, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; "
                f"choose a number of heads that divides {embed_dim}"
            )
        self.num_heads = num_heads
        self.attend: Attend = attend_per_group
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """Packed tokens [T, D] to packed tokens [T, D]."""
        qkv = self.qkv(tokens).view(tokens.shape[0], 3, self.num_heads, -1)
        projected: Tensor = self.proj(self.attend(qkv, groups=groups))
        return projected


def attend_per_group(qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
    """One group after the other: its crops have equal length, so that no mask is needed."""
    attended = []
    for rows, group in zip(split_rows(qkv, groups=groups), groups, strict=True):
        heads = rows.view(group.num_crops, group.num_tokens, *rows.shape[1:])
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [crops, heads, tokens, d]
        values = _attended(query, key, value)
        attended.append(values.transpose(1, 2).reshape(group.num_rows, -1))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of queries, keys and values [crops, heads, tokens, d].

    The fused kernel's backward pass in bfloat16 on a CPU takes about ten times as long as two
    matrix products and a softmax, which are used while their scores fit.
    """
    num_scores = query.shape[:-1].numel() * key.shape[-2]
    is_cpu_bf16 = device_kind(query) == "cpu" and query.dtype == torch.bfloat16
    if is_cpu_bf16 and num_scores <= MAX_PLAIN_SCORES:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return torch.softmax(scores, dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)
