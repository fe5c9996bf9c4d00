"""Cross-entropy between student and teacher on masked patches."""

from __future__ import annotations

from torch import Tensor

from dinov2_core.losses.prototypes import expected_prototypes, log_partition
from dinov2_core.losses.terms import LossInputs


def ibot_loss(inputs: LossInputs, *, student_temperature: float) -> dict[str, Tensor]:
    """Mean over crops of the mean cross-entropy of their masked patches, arXiv:2111.07832.

    A crop without masked patches counts as 0.

    Args:
        inputs: Student's features of the M masked patches, targets and weights.
        student_temperature: Divides the student's scores; > 0, no unit.

    Returns:
        ibot.
    """
    features, prototypes = inputs.patches.features, inputs.patches.prototypes
    log_sums = log_partition(features, prototypes=prototypes, temperature=student_temperature)
    expected = expected_prototypes(inputs.patches.targets, prototypes=prototypes)
    expected_scores = (features.float() * expected).sum(dim=1) / student_temperature
    cross_entropy = log_sums - expected_scores  # [M]
    num_crops = inputs.global_crops.shape[0]
    return {"ibot": (cross_entropy * inputs.mask_weights.float()).sum() / num_crops}
