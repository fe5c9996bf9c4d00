"""Weighted nearest-neighbour classification of frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK_SIMILARITIES = 16 * 2**20  # 128 MiB of float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The nearest references of each query, nearest first."""

    similarities: Tensor
    """Cosine similarities [Q, k], float64."""
    indices: Tensor
    """Positions among the references [Q, k], int64."""


def nearest_neighbours(queries: Tensor, *, references: Tensor, num_neighbours: int) -> Neighbours:
    """Find the references with the largest cosine similarity, exactly.

    Similarities are float64: the tokens of an untrained network differ by less than float32
    resolves in a cosine near one. Queries go in chunks, so that memory stays bounded.

    Args:
        queries: Features [Q, D], any float dtype.
        references: Features [N, D] on the same device.
        num_neighbours: Neighbours k per query, 1 <= k <= N.
    """
    if not 1 <= num_neighbours <= len(references):
        raise ValueError(
            f"num_neighbours {num_neighbours} is not between 1 and the {len(references)} labelled "
            "images to look among; choose fewer neighbours or label more images"
        )
    normalised = normalize(references.double(), dim=1)
    chunks = torch.split(queries, max(1, _CHUNK_SIMILARITIES // len(references)))
    found = [
        (normalize(chunk.double(), dim=1) @ normalised.T).topk(num_neighbours, dim=1)  # [q, k]
        for chunk in chunks
    ]
    return Neighbours(
        similarities=torch.cat([values for values, _ in found]),
        indices=torch.cat([indices for _, indices in found]),
    )


def knn_accuracies(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_neighbours: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Classify by the vote of the nearest neighbours, each weighing exp(similarity / temperature).

    The protocol of arXiv:2104.14294 and arXiv:2304.07193, which report the best k.

    Args:
        train_features: Labelled features [N, D].
        train_labels: Classes [N], int64, >= 0.
        test_features: Features to classify [Q, D].
        test_labels: Their classes [Q].
        num_neighbours: Every k to score; each at most N.
        temperature: Divides the similarities; > 0, no unit.

    Returns:
        Share of test images classified rightly, in [0, 1], for every k.
    """
    if not num_neighbours or temperature <= 0:
        raise ValueError(
            f"num_neighbours {num_neighbours} and temperature {temperature}: give at least one "
            "number of neighbours and a positive temperature"
        )
    neighbours = nearest_neighbours(
        test_features, references=train_features, num_neighbours=max(num_neighbours)
    )
    weights = (neighbours.similarities / temperature).softmax(dim=1)
    num_classes = int(train_labels.max()) + 1
    scores: dict[int, float] = {}
    for k in num_neighbours:
        votes = weights.new_zeros(len(test_features), num_classes)
        votes.scatter_add_(1, train_labels[neighbours.indices[:, :k]], weights[:, :k])  # [Q, K]
        scores[k] = (votes.argmax(dim=1) == test_labels).double().mean().item()
    return scores
