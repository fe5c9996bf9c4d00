"""The feed-forward part of a block: MLP or SwiGLU."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeedForward = Literal["mlp", "swiglu"]


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(hidden)) that keeps only `hidden`: its GELU is the widest result of a block."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        weight_grad = grad.T @ F.gelu(hidden)
        hidden_grad = torch.ops.aten.gelu_backward(grad @ weight, hidden)
        return hidden_grad, weight_grad, grad.sum(dim=0)


class _GatedLinear(torch.autograd.Function):
    """linear(silu(gate) * value) that keeps only gate and value [T, 2 G], which lie together."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        gate, value = hidden.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        gate, value = hidden.chunk(2, dim=-1)
        opened = F.silu(gate)
        weight_grad = grad.T @ (opened * value)
        gated_grad = grad @ weight
        gate_grad = torch.ops.aten.silu_backward(gated_grad * value, gate)
        hidden_grad = torch.cat([gate_grad, gated_grad * opened], dim=-1)
        return hidden_grad, weight_grad, grad.sum(dim=0)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] to tokens [T, D]."""
        output: Tensor = _GeluLinear.apply(self.fc1(tokens), self.fc2.weight, self.fc2.bias)
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
        output: Tensor = _GatedLinear.apply(self.w12(tokens), self.w3.weight, self.w3.bias)
        return output


def feed_forward(kind: FeedForward, *, embed_dim: int, hidden_dim: int) -> Mlp | SwiGlu:
    """The feed-forward part that a name stands for; hidden_dim is the MLP's width."""
    kinds: dict[FeedForward, type[Mlp | SwiGlu]] = {"mlp": Mlp, "swiglu": SwiGlu}
    return kinds[kind](embed_dim=embed_dim, hidden_dim=hidden_dim)
