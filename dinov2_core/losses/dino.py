"""Image-level cross-entropy between student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_core.losses.prototypes import expected_prototypes, log_partition
from dinov2_core.losses.terms import LossInputs


def dino_loss(inputs: LossInputs, *, student_temperature: float) -> dict[str, Tensor]:
    """Cross-entropy of every student crop with every teacher crop but itself.

    The mean over the 2 L + 2 pairs, arXiv:2104.14294 eq. 3 and arXiv:2304.07193; each pair
    averages over the images. Cross-entropy is linear in the target, so that a local crop meets
    the sum of both teachers once.

    Args:
        inputs: Student's features of the cls tokens, and targets.
        student_temperature: Divides the student's scores; > 0, no unit.

    Returns:
        dino_local, of the pairs of a local student crop with either teacher crop, and
        dino_global, of the pairs of a global one with the other teacher crop; their sum is the
        mean over all pairs.
    """
    features, prototypes = inputs.cls.features, inputs.cls.prototypes
    num_images = inputs.global_crops.shape[0] // 2
    sizes = [features.shape[0] - 2 * num_images, 2 * num_images]
    num_local_crops = sizes[0] // num_images
    log_sums = log_partition(features, prototypes=prototypes, temperature=student_temperature)
    local_sums, global_sums = torch.split(log_sums, sizes)
    expected = expected_prototypes(inputs.cls.targets, prototypes=prototypes)
    first, second = expected.view(2, num_images, -1)  # [B, d] each
    both = (first + second).repeat(num_local_crops, 1)
    swapped = torch.cat([second, first])
    local_features, global_features = torch.split(features, sizes)
    local_scores = (local_features.float() * both).sum(dim=1) / student_temperature
    global_scores = (global_features.float() * swapped).sum(dim=1) / student_temperature
    scale = num_images * (2 * num_local_crops + 2)
    return {
        "dino_local": (2 * local_sums - local_scores).sum() / scale,
        "dino_global": (global_sums - global_scores).sum() / scale,
    }
