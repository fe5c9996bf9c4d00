"""Whole matrices of what the package keeps in factors."""

from __future__ import annotations

from torch import Tensor

from dinov2_core.losses.prototypes import Assignments


def dense_targets(assignments: Assignments) -> Tensor:
    """Targets [M, K], float32."""
    scores = assignments.features.float() @ assignments.prototypes.float().T
    shifted = scores / assignments.temperature + assignments.prototype_scaling
    return (shifted + assignments.sample_scaling[:, None]).exp()
