"""Image to patch tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchGrid:
    """Patches of an image, counted downwards and across."""

    height: int
    """Rows of patches."""
    width: int
    """Columns of patches."""


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to a token."""

    def __init__(self, *, patch_size_pixels: int, num_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size_pixels = patch_size_pixels
        self.proj = nn.Conv2d(
            num_channels, embed_dim, kernel_size=patch_size_pixels, stride=patch_size_pixels
        )

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Uniform within 1 / sqrt(fan in), as a convolution's default."""
        nn.init.kaiming_uniform_(self.proj.weight, a=math.sqrt(5), generator=generator)
        if self.proj.bias is not None:
            bound = 1 / math.sqrt(self.proj.weight[0].numel())
            nn.init.uniform_(self.proj.bias, -bound, bound, generator=generator)

    def grid(self, images: Tensor) -> PatchGrid:
        """Patches of images [B, C, H, W].

        Raises:
            ValueError: When a side is not a multiple of the patch, or the channels differ.
        """
        patch = self.patch_size_pixels
        num_channels, height, width = images.shape[1:]
        if num_channels != self.proj.in_channels:
            raise ValueError(
                f"images have {num_channels} channels but the patch embedding was built for "
                f"{self.proj.in_channels}; set num_channels to {num_channels} or convert the images"
            )
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"image of {height} x {width} pixels is not a whole number of patches of {patch} "
                f"pixels; crop or resize both sides to a multiple of {patch}"
            )
        return PatchGrid(height=height // patch, width=width // patch)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to patch tokens [B, N, D], row by row."""
        projected: Tensor = self.proj(images.to(self.proj.weight.dtype))
        return projected.flatten(2).transpose(1, 2)
