"""What a loss term is: a function of the networks' outputs, and how it follows from parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dinov2_core.losses.prototypes import Assignments


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Outputs of a student's head and the teacher's targets for them."""

    features: Tensor
    """Rows [.., d] of length 1."""
    prototypes: Tensor
    """[K, d]."""
    targets: Assignments
    """Of the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a term may use of a batch, or of a part of it: B images, 2 global and L local crops.

    Crops stand by crop, not by image: crop 0 of all images, then crop 1.
    """

    global_crops: Tensor
    """Pixels [2B, C, H, W]."""
    cls_tokens: Tensor
    """Student's cls tokens [2B, D] of the global crops."""
    patch_tokens: Tensor
    """Student's patch tokens [2B, N, D] of the global crops."""
    cls: Predictions
    """Rows [L * B + 2B] of local, then global crops; targets of the 2B global crops."""
    patches: Predictions
    """Rows and targets of the M masked patches."""
    mask_weights: Tensor
    """1 / number of masked patches of the crop a patch belongs to, [M]; 0 for padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanTerm:
    """A mean over images: that of a batch is the mean over equal parts of it."""

    weight: float
    """Factor of the losses."""
    losses: Callable[[LossInputs], dict[str, Tensor]]
    """Scalars float32 under the names they are logged under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoupledTerm:
    """Couples all images of a batch by their cls tokens: parts alone do not give it."""

    weight: float
    """Factor of the losses."""
    losses: Callable[[Tensor], dict[str, Tensor]]
    """The same from the student's cls tokens [2B, D] of the whole batch. Collective."""


LossTerm = MeanTerm | CoupledTerm


def absent_term(name: str) -> MeanTerm:
    """A term that the settings leave out, logged as 0."""
    return MeanTerm(weight=0.0, losses=lambda inputs: {name: inputs.mask_weights.new_zeros(())})
