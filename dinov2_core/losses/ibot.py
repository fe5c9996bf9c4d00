"""Cross-entropy between student and teacher on masked patches."""

from __future__ import annotations

from torch import Tensor

from dinov2_core.losses.prototypes import (
    CHUNK_SIZE,
    Assignments,
    expected_prototypes,
    log_partition,
)


def ibot_loss(
    assignments: Assignments,
    *,
    features: Tensor,
    prototypes: Tensor,
    mask_weights: Tensor,
    num_crops: int,
    student_temperature: float,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Mean over crops of the mean cross-entropy of their masked patches, arXiv:2111.07832.

    A crop without masked patches counts as 0.

    Args:
        assignments: Teacher targets of the M masked patches.
        features: Student features [M, d] of the same patches, length 1.
        prototypes: Student prototypes [K, d].
        mask_weights: 1 / number of masked patches of the crop a patch belongs to, [M].
        num_crops: Global crops of this rank, masked or not.
        student_temperature: Divides the student's scores; > 0, no unit.
        chunk_size: Prototypes whose scores exist at a time.

    Returns:
        Scalar float32.
    """
    log_sums = log_partition(
        features, prototypes=prototypes, temperature=student_temperature, chunk_size=chunk_size
    )
    expected = expected_prototypes(assignments, prototypes=prototypes, chunk_size=chunk_size)
    expected_scores = (features.float() * expected).sum(dim=1) / student_temperature
    cross_entropy = log_sums - expected_scores  # [M]
    return (cross_entropy * mask_weights.float()).sum() / num_crops
