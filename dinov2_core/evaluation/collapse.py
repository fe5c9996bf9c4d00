"""Signs that features have collapsed onto few directions or few prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class PrototypeUsage:
    """How many prototypes the samples choose."""

    share: float
    """Prototypes that are the first choice of at least one sample, of all; in (0, 1]."""
    effective_number: float
    """Exponential of the entropy of first choices; at most the lesser of N and K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseReport:
    """Measures of one fixed sample of features."""

    effective_rank: float
    """RankMe; between 1 and the lesser of N and D."""
    feature_deviation: float
    """See `feature_deviation`."""
    mean_cosine: float
    """See `mean_pairwise_cosine`."""
    prototypes: PrototypeUsage | None
    """Only where scores were given."""


def collapse_report(features: Tensor, *, scores: Tensor | None = None) -> CollapseReport:
    """Measure a sample of features [N, D] and, if given, its prototype scores [N, K]; N >= 2."""
    return CollapseReport(
        effective_rank=effective_rank(features),
        feature_deviation=feature_deviation(features),
        mean_cosine=mean_pairwise_cosine(features),
        prototypes=None if scores is None else prototype_usage(scores),
    )


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the singular values' shares; RankMe, arXiv:2210.02885.

    Args:
        features: [N, D], not centred, as in the paper; compare only samples of equal N.
    """
    _check(features)
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()


def feature_deviation(features: Tensor) -> float:
    """Standard deviation over samples of L2-normalised features, averaged over dimensions.

    Evenly spread features [N, D] give 1 / sqrt(D), collapsed ones 0; arXiv:2011.10566.
    """
    _check(features)
    return normalize(features.double(), dim=1).std(dim=0).mean().item()


def mean_pairwise_cosine(features: Tensor) -> float:
    """Mean cosine similarity of all pairs of different samples of [N, D]; 1 when collapsed."""
    _check(features)
    count = len(features)
    normalised = normalize(features.double(), dim=1)
    with_self = normalised.sum(dim=0).square().sum()
    return ((with_self - normalised.square().sum()) / (count * (count - 1))).item()


def prototype_usage(scores: Tensor) -> PrototypeUsage:
    """Count first choices among prototypes.

    Args:
        scores: Samples against prototypes [N, K], any monotone scale.
    """
    counts = scores.argmax(dim=1).bincount(minlength=scores.shape[1]).double()
    shares = counts[counts > 0] / counts.sum()
    return PrototypeUsage(
        share=(counts > 0).double().mean().item(),
        effective_number=torch.exp(-(shares * shares.log()).sum()).item(),
    )


def _check(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features of shape {tuple(features.shape)} cannot be judged for collapse; give "
            "[N, D] with at least two samples"
        )
