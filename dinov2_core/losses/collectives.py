"""Reductions over all ranks that also work in a single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over the ranks, no gradient. Collective."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def log_sum_over_ranks(log_values: Tensor) -> Tensor:
    """Elementwise log of the sum over the ranks of exp, no gradient. Collective.

    A rank without a share contributes minus infinity.
    """
    if world_size() == 1:
        return log_values
    largest = log_values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    largest.clamp_(min=torch.finfo(largest.dtype).min)
    total = (log_values - largest).exp_()
    dist.all_reduce(total)
    return total.log_().add_(largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalRows:
    """Rows of all ranks, rank after rank."""

    rows: Tensor
    """[sum of B over the ranks, D]; gradients flow back to the rank a row came from."""
    first_row: int
    """Where this rank's rows begin."""


class _GatherRows(torch.autograd.Function):
    """All-gather of rows [B, D] padded to the largest B; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = list(padded.new_empty(len(counts), *padded.shape).unbind())
        dist.all_gather(gathered, padded)
        if min(counts) < max(counts):
            gathered = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        total, first_row = sum_over_ranks(grad.contiguous()), sum(ctx.counts[: rank()])
        return total[first_row : first_row + ctx.counts[rank()]], None


def gather_rows(rows: Tensor) -> GlobalRows:
    """Rows [B, ..] of every rank, B may differ from rank to rank. Collective, differentiable.

    A loss that every rank computes on its share and whose gradients are averaged over the ranks
    gets the gradient of the mean of the shares. Counts are exchanged between the hosts, so that
    no rank waits for its device.
    """
    if world_size() == 1:
        return GlobalRows(rows=rows, first_row=0)
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = rows.shape[0]
    dist.all_reduce(counts)
    sizes: list[int] = counts.tolist()
    gathered: Tensor = _GatherRows.apply(rows, sizes)
    return GlobalRows(rows=gathered, first_row=sum(sizes[: rank()]))
