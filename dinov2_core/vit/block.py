"""Pre-norm transformer block with LayerScale and stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2_core.vit.attention import Attention
from dinov2_core.vit.feed_forward import FeedForward, feed_forward
from dinov2_core.vit.packing import CropGroup
from dinov2_core.vit.stochastic_depth import add_residual

NORM_EPSILON = 1e-6


class LayerScale(nn.Module):
    """A learned factor per channel, arXiv:2103.17239."""

    def __init__(self, *, embed_dim: int, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.gamma = nn.Parameter(torch.empty(embed_dim))

    def init_weights(self) -> None:
        """Set every factor to its initial value."""
        nn.init.constant_(self.gamma, self.initial_value)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] to tokens [T, D]."""
        return tokens * self.gamma


class Block(nn.Module):
    """Attention and feed-forward part, each normalised before and scaled after."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        feed_forward_kind: FeedForward,
        drop_path_rate: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.attn = Attention(embed_dim=embed_dim, num_heads=num_heads)
        self.ls1 = LayerScale(embed_dim=embed_dim, initial_value=layer_scale)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.mlp = feed_forward(feed_forward_kind, embed_dim=embed_dim, hidden_dim=hidden_dim)
        self.ls2 = LayerScale(embed_dim=embed_dim, initial_value=layer_scale)

    def forward(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        """Packed tokens [T, D] to packed tokens [T, D].

        In training mode both residual branches skip a share drop_path_rate of the crops of
        every group, drawn first for attention, then for the feed-forward part.
        """
        drop_rate = self.drop_path_rate if self.training else 0.0
        tokens = add_residual(
            tokens, branch=self._attention_branch, groups=groups, drop_rate=drop_rate
        )
        return add_residual(
            tokens, branch=self._feed_forward_branch, groups=groups, drop_rate=drop_rate
        )

    def _attention_branch(self, tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
        residual: Tensor = self.ls1(self.attn(self.norm1(tokens), groups=groups))
        return residual

    def _feed_forward_branch(
        self,
        tokens: Tensor,
        *,
        groups: Sequence[CropGroup],  # noqa: ARG002  (as every branch)
    ) -> Tensor:
        residual: Tensor = self.ls2(self.mlp(self.norm2(tokens)))
        return residual
