"""The one Sinkhorn-Knopp, for cls tokens and masked patches alike, in the log domain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_core.losses.collectives import log_sum_over_ranks
from dinov2_core.losses.prototypes import (
    CHUNK_SIZE,
    Assignments,
    chunks,
    highest_of,
    log_sum_exp,
    scores,
    without_padding,
)


@torch.no_grad()
def sinkhorn_knopp(
    features: Tensor,
    *,
    prototypes: Tensor,
    temperature: float,
    num_iterations: int,
    is_sample: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Assignments:
    """Assign samples to prototypes so that every prototype weighs the same.

    Alternates dividing by prototype sums (over all ranks) and by sample sums; SwAV,
    arXiv:2006.09882. One pass over the prototypes per iteration: within a chunk the prototype
    sums are complete, the sample sums accumulate from chunk to chunk. In the log domain, so that
    no score overflows. Collective: every rank must call it, with the same chunk size and any
    number of samples.

    Args:
        features: Teacher features [M, d] of this rank, length 1, float32 or bfloat16.
        prototypes: Teacher prototypes [K, d], the same on every rank.
        temperature: Divides the scores; > 0, no unit.
        num_iterations: Alternations, >= 1. DINOv2 uses 3.
        is_sample: [M] bool, false for rows that only pad and count for nothing; None when all
            rows are samples.
        chunk_size: Prototypes whose scores exist at a time.

    Returns:
        Assignments [M, K] in factored form, no gradient; rows sum to 1, those that pad to 0.
    """
    sample_scaling = features.new_zeros(features.shape[0], dtype=torch.float32)
    sample_scaling = without_padding(sample_scaling, is_sample=is_sample)
    prototype_scaling = features.new_empty(prototypes.shape[0], dtype=torch.float32)
    for iteration in range(num_iterations):
        sums = _first_sample_sums if iteration == 0 else _sample_sums
        log_sample_sums = torch.full_like(sample_scaling, -torch.inf)
        for columns in chunks(prototypes, chunk_size=chunk_size):
            chunk = scores(
                features,
                prototypes=prototypes[columns],
                temperature=temperature,
                shift=sample_scaling[:, None],
            )
            log_sums, prototype_scaling[columns] = sums(chunk)
            log_sample_sums = torch.logaddexp(log_sample_sums, log_sums)
        correction = without_padding(-log_sample_sums, is_sample=is_sample)
        sample_scaling = sample_scaling + correction
    return Assignments(
        features=features,
        prototypes=prototypes,
        temperature=temperature,
        sample_scaling=sample_scaling,
        prototype_scaling=prototype_scaling,
    )


def _first_sample_sums(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Sample sums and prototype scalings of scores [M, chunk] that nothing has scaled yet.

    A sample may be so far from what others score that its share of every prototype is below the
    smallest float32: only logarithms hold such sums.

    Returns:
        Logarithms of the sample sums after scaling [M], and what scales the prototypes [chunk].
    """
    scaling = _prototype_scaling(log_sum_exp(chunk.clone(), dim=0))
    return log_sum_exp(chunk.add_(scaling), dim=1), scaling


def _sample_sums(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """The same of scores whose samples summed to 1 before, with half as many passes over them.

    Such a sample keeps at least the share 1 / M after its prototypes are scaled, of which one of K
    prototypes gives at least 1 / (M K): far from the smallest float32. So exponentials taken once
    serve both sums, and sums are products with vectors.
    """
    highest = highest_of(chunk, dim=0)
    shares = chunk.sub_(highest).exp_()
    column_sums = torch.mv(shares.T, shares.new_ones(shares.shape[0]))
    scaling = _prototype_scaling(column_sums.log_().add_(highest))
    return torch.mv(shares, (scaling + highest).exp_()).log_(), scaling


def _prototype_scaling(log_prototype_sums: Tensor) -> Tensor:
    """What makes prototypes sum to 1 over all ranks; finite where no rank has a sample."""
    smallest = torch.finfo(log_prototype_sums.dtype).min
    return -log_sum_over_ranks(log_prototype_sums).clamp(min=smallest)


class SinkhornTargets(nn.Module):
    """Teacher targets by Sinkhorn-Knopp; keeps nothing from batch to batch.

    Args:
        num_iterations: Alternations, >= 1.
    """

    def __init__(self, *, num_iterations: int) -> None:
        super().__init__()
        self.num_iterations = num_iterations

    def init_weights(self) -> None:
        """Nothing to forget."""

    def forward(
        self,
        features: Tensor,
        *,
        prototypes: Tensor,
        temperature: float,
        is_sample: Tensor | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> Assignments:
        """Targets of one batch, see `sinkhorn_knopp`. Collective."""
        return sinkhorn_knopp(
            features,
            prototypes=prototypes,
            temperature=temperature,
            num_iterations=self.num_iterations,
            is_sample=is_sample,
            chunk_size=chunk_size,
        )
