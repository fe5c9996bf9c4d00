"""Settings of what the networks see: crops of the images and masks of their patches."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dinov2_core.config.frozen import Frozen

NUM_GLOBAL_CROPS = 2


class Crops(Frozen):
    """Multi-crop augmentation, arXiv:2104.14294 and the recipe of arXiv:2304.07193."""

    global_crop_size_pixels: int = Field(224, ge=8)
    """Side of the two global crops."""
    local_crop_size_pixels: int = Field(98, ge=4)
    """Side of the local crops."""
    num_local_crops: int = Field(8, ge=0)
    """Local crops per image."""
    global_crop_scale: tuple[float, float] = (0.32, 1.0)
    """Smallest and largest share of the image's area in a global crop."""
    local_crop_scale: tuple[float, float] = (0.05, 0.32)
    """Smallest and largest share of the image's area in a local crop."""
    horizontal_flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring a crop left to right."""
    color_jitter_probability: float = Field(0.8, ge=0, le=1)
    """Probability of the colour jitter (brightness, contrast .4, saturation .2, hue .1)."""
    grayscale_probability: float = Field(0.2, ge=0, le=1)
    """Probability of dropping the colours."""
    blur_probabilities: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """Gaussian blur of first global, second global and local crops. These are what the released
    weights were trained with; arXiv:2104.14294 states (1.0, 0.1, 0.5)."""
    solarize_probability: float = Field(0.2, ge=0, le=1)
    """Probability of solarising the second global crop."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted per channel from values in [0, 1]."""
    standard_deviation: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides per channel after the mean is subtracted."""

    @property
    def num_channels(self) -> int:
        """Channels C of images and crops, 1 or 3."""
        return len(self.mean)

    @property
    def num_crops(self) -> int:
        """Crops of one image, global ones first."""
        return NUM_GLOBAL_CROPS + self.num_local_crops

    @model_validator(mode="after")
    def _scales_are_intervals(self) -> Self:
        for name in ("global_crop_scale", "local_crop_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} [{low}, {high}] is not an interval within (0, 1]")
        if any(not 0 <= p <= 1 for p in self.blur_probabilities):
            raise ValueError(f"blur_probabilities {self.blur_probabilities} must lie in [0, 1]")
        if any(deviation <= 0 for deviation in self.standard_deviation):
            raise ValueError(
                f"standard_deviation {list(self.standard_deviation)} must be more than 0"
            )
        if len(self.mean) != len(self.standard_deviation):
            raise ValueError(
                f"mean has {len(self.mean)} channels, standard_deviation "
                f"{len(self.standard_deviation)}; give one value per channel to both"
            )
        return self


class Masking(Frozen):
    """Block-wise masks of the student's global crops, arXiv:2111.07832."""

    probability: float = Field(0.5, ge=0, le=1)
    """Share of the global crops that are masked."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of masked patches in a masked crop."""

    @model_validator(mode="after")
    def _ratio_is_interval(self) -> Self:
        low, high = self.ratio
        if not 0 <= low <= high < 1:
            raise ValueError(f"ratio [{low}, {high}] is not an interval within [0, 1)")
        return self
