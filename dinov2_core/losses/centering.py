"""Softmax targets after subtracting a running mean of the teacher's scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_core.losses.collectives import sum_over_ranks
from dinov2_core.losses.prototypes import CHUNK_SIZE, Assignments, log_sums, without_padding


class CenteredTargets(nn.Module):
    """Softmax of (scores - centre) / temperature, arXiv:2104.14294.

    The centre is an exponential moving average of the mean score of every prototype over all
    samples of all ranks. A batch takes effect one call later: its mean waits in `pending`, so
    that step t uses the batches before t.

    Args:
        num_prototypes: Number K of prototypes.
        momentum: Share of the old centre, in [0, 1).
    """

    center: Tensor
    """[K] float32, applied."""
    pending: Tensor
    """[K] float32, mean scores of the latest batch, not applied yet."""

    def __init__(self, *, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("pending", torch.zeros(num_prototypes))

    def init_weights(self) -> None:
        """Forget every batch."""
        self.center.zero_()
        self.pending.zero_()

    @torch.no_grad()
    def forward(
        self,
        features: Tensor,
        *,
        prototypes: Tensor,
        temperature: float,
        is_sample: Tensor | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> Assignments:
        """Targets of one batch; applies the batch before and notes this one. Collective.

        Args:
            features: Teacher features [M, d] of this rank, length 1; M may differ between ranks.
            prototypes: Teacher prototypes [K, d], the same on every rank.
            temperature: Divides the scores; > 0, no unit.
            is_sample: [M] bool, false for rows that only pad and count for nothing; None when
                all rows are samples.
            chunk_size: Prototypes whose scores exist at a time.

        Returns:
            Assignments [M, K] in factored form, no gradient; rows sum to 1, those that pad to 0.
        """
        self.center.mul_(self.momentum).add_(self.pending, alpha=1 - self.momentum)
        self.pending.copy_(self._mean_scores(features, prototypes=prototypes, is_sample=is_sample))
        prototype_scaling = self.center / -temperature
        sample_sums = log_sums(
            features,
            prototypes=prototypes,
            temperature=temperature,
            shift=prototype_scaling,
            chunk_size=chunk_size,
        )
        return Assignments(
            features=features,
            prototypes=prototypes,
            temperature=temperature,
            sample_scaling=without_padding(-sample_sums, is_sample=is_sample),
            prototype_scaling=prototype_scaling,
        )

    def _mean_scores(
        self, features: Tensor, *, prototypes: Tensor, is_sample: Tensor | None
    ) -> Tensor:
        """Mean score per prototype: by linearity, the score of the mean feature."""
        if is_sample is None:
            is_sample = features.new_ones(features.shape[0], dtype=torch.bool)
        samples = features.float() * is_sample[:, None]
        totals = sum_over_ranks(torch.cat([samples.sum(dim=0), is_sample.sum()[None].float()]))
        mean_feature = totals[:-1] / totals[-1].clamp(min=1)
        return prototypes.float() @ mean_feature
