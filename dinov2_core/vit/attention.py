"""Self-attention over a packed sequence of crops of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dinov2_core.vit.attention_kernels import Kernel, attend
from dinov2_core.vit.packing import CropGroup


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    The attribute `kernel` says how attention is computed; group by group runs everywhere.
    """

    def __init__(self, *, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; "
                f"choose a number of heads that divides {embed_dim}"
            )
        self.num_heads = num_heads
        self.kernel: Kernel = "per_group"
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """Packed tokens [T, D] to packed tokens [T, D]."""
        qkv = self.qkv(tokens)
        attended = attend(qkv, groups=groups, num_heads=self.num_heads, kernel=self.kernel)
        projected: Tensor = self.proj(attended)
        return projected
