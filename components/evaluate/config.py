"""Settings of the evaluation stage."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from components.local_paths import LocalPath
from dinov2_core.config.frozen import Frozen


class EvaluationSet(Frozen):
    """Labelled images: one folder per class, or a Parquet file with columns `image`, `label`.

    Local or below s3://.
    """

    name: str = Field(pattern="^[a-z][a-z0-9_]{0,39}$")
    """Prefix of the metrics."""
    train: LocalPath = Field(min_length=1)
    """Images whose labels the classifiers are given."""
    test: LocalPath = Field(min_length=1)
    """Images whose labels are predicted; their copies are kept out of training."""


class EvaluateSettings(Frozen):
    """How features are measured."""

    image_size_pixels: int | None = Field(None, ge=8)
    """Side of the centre crop; null takes the teacher's own resolution."""
    pixel_size_pixels: int = Field(28, ge=4)
    """Side to which images are reduced for the raw-pixel baseline."""
    neighbours: tuple[int, ...] = (10, 20)
    """Values of k for the nearest-neighbour vote; the last one is the headline `knn_top1`."""
    max_train_images: int = Field(20_000, ge=10)
    """Labelled images used per set, evenly spaced."""
    max_test_images: int = Field(20_000, ge=10)
    """Test images used per set, evenly spaced."""
    batch_size: int = Field(128, ge=1)
    """Images per forward pass."""
    seed: int = Field(0, ge=0)
    """Of the untrained baseline and of the split that chooses the regularisation."""

    @model_validator(mode="after")
    def _neighbours_are_positive(self) -> Self:
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"neighbours {list(self.neighbours)} must be whole numbers from 1 up")
        return self


class EvaluateStage(Frozen):
    """From a teacher to numbers and pictures."""

    sets: tuple[EvaluationSet, ...] = ()
    """Labelled sets; without any, only collapse indicators and pictures are made."""
    settings: EvaluateSettings = EvaluateSettings()
    """How features are measured."""
