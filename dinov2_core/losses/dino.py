"""Image-level cross-entropy between student and teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_core.losses.prototypes import (
    CHUNK_SIZE,
    Assignments,
    expected_prototypes,
    log_partition,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DinoLosses:
    """The two shares of the mean over all pairs of a student and another teacher crop."""

    local_crops: Tensor
    """Scalar float32, pairs of a local student crop with either teacher crop."""
    global_crops: Tensor
    """Scalar float32, pairs of a global student crop with the other teacher crop."""


def dino_losses(
    assignments: Assignments,
    *,
    global_features: Tensor,
    local_features: Tensor,
    prototypes: Tensor,
    student_temperature: float,
    chunk_size: int = CHUNK_SIZE,
) -> DinoLosses:
    """Cross-entropy of every student crop with every teacher crop but itself.

    The mean over the 2 L + 2 pairs, arXiv:2104.14294 eq. 3 and arXiv:2304.07193; each pair
    averages over the images. Cross-entropy is linear in the target, so that a local crop meets
    the sum of both teachers once.

    Args:
        assignments: Teacher targets of the 2B global crops, crop 0 of all images first.
        global_features: Student features [2B, d] in the same order, length 1.
        local_features: Student features [L * B, d], local crop 0 of all images first.
        prototypes: Student prototypes [K, d].
        student_temperature: Divides the student's scores; > 0, no unit.
        chunk_size: Prototypes whose scores exist at a time.

    Returns:
        Both shares, whose sum is the mean over all pairs.
    """
    num_images = global_features.shape[0] // 2
    num_local_crops = local_features.shape[0] // num_images
    num_pairs = 2 * num_local_crops + 2
    log_sums = log_partition(
        torch.cat([local_features, global_features]),
        prototypes=prototypes,
        temperature=student_temperature,
        chunk_size=chunk_size,
    )
    local_sums, global_sums = torch.split(log_sums, [local_features.shape[0], 2 * num_images])
    expected = expected_prototypes(assignments, prototypes=prototypes, chunk_size=chunk_size)
    first, second = expected.view(2, num_images, -1)  # [B, d] each
    both = (first + second).repeat(num_local_crops, 1)
    swapped = torch.cat([second, first])
    local_scores = (local_features.float() * both).sum(dim=1) / student_temperature
    global_scores = (global_features.float() * swapped).sum(dim=1) / student_temperature
    scale = num_images * num_pairs
    return DinoLosses(
        local_crops=(2 * local_sums - local_scores).sum() / scale,
        global_crops=(global_sums - global_scores).sum() / scale,
    )
