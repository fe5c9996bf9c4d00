"""The one Sinkhorn-Knopp, for cls tokens and masked patches alike, in the log domain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_core.losses.collectives import log_sum_over_ranks
from dinov2_core.losses.prototypes import (
    CHUNK_SIZE,
    Assignments,
    chunks,
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
    num_samples, num_prototypes = features.shape[0], prototypes.shape[0]
    sample_scaling = features.new_zeros(num_samples, dtype=torch.float32)
    sample_scaling = without_padding(sample_scaling, is_sample=is_sample)
    smallest = torch.finfo(torch.float32).min
    prototype_scaling = features.new_empty(num_prototypes, dtype=torch.float32)
    for _ in range(num_iterations):
        log_sample_sums = torch.full_like(sample_scaling, -torch.inf)
        for columns in chunks(prototypes, chunk_size=chunk_size):
            chunk = scores(features, prototypes=prototypes[columns], temperature=temperature)
            log_prototype_sums = log_sum_exp(chunk + sample_scaling[:, None], dim=0)
            scaling = -log_sum_over_ranks(log_prototype_sums).clamp(min=smallest)  # no sample
            prototype_scaling[columns] = scaling
            chunk += scaling
            log_sample_sums = torch.logaddexp(log_sample_sums, log_sum_exp(chunk, dim=1))
        sample_scaling = without_padding(-log_sample_sums, is_sample=is_sample)
    return Assignments(
        features=features,
        prototypes=prototypes,
        temperature=temperature,
        sample_scaling=sample_scaling,
        prototype_scaling=prototype_scaling,
    )


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
