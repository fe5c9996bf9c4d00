"""The feed-forward part of a block: MLP or SwiGLU."""

from __future__ import annotations

from typing import Literal, assert_never

import torch.nn.functional as F
from torch import Tensor, nn

FeedForward = Literal["mlp", "swiglu"]


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] to tokens [T, D]."""
        output: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return output


class SwiGlu(nn.Module):
    """Gated linear unit with SiLU, arXiv:2002.05202; gate and value share one projection.

    The hidden width is two thirds of the MLP's, rounded up to a multiple of 8, so that both
    have about the same number of parameters.
    """

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        gated_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(embed_dim, 2 * gated_dim)
        self.w3 = nn.Linear(gated_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] to tokens [T, D]."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        output: Tensor = self.w3(F.silu(gate) * value)
        return output


def feed_forward(kind: FeedForward, *, embed_dim: int, hidden_dim: int) -> Mlp | SwiGlu:
    """The feed-forward part that a name stands for; hidden_dim is the MLP's width."""
    match kind:
        case "mlp":
            return Mlp(embed_dim=embed_dim, hidden_dim=hidden_dim)
        case "swiglu":
            return SwiGlu(embed_dim=embed_dim, hidden_dim=hidden_dim)
        case _:
            assert_never(kind)
