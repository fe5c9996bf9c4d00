"""Image to patch tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
        weight = self.proj.weight
        projected: Tensor = _Projection.apply(images.to(weight.dtype), weight, self.proj.bias)
        return projected.flatten(2).transpose(1, 2)


class _Projection(torch.autograd.Function):
    """The convolution; backward one matrix product, for patches do not overlap.

    A CPU takes thirty times as long for the gradient of the convolution.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias, stride=weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        images, weight = ctx.saved_tensors
        size = weight.shape[-1]
        grad = grad_outputs[0].flatten(2).transpose(1, 2).flatten(0, 1)  # [B * N, D]
        patches = images.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # [B, C, h, s, w, s]
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)  # [B * N, C * s * s]
        images_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            images_grad = F.conv_transpose2d(grad_outputs[0], weight, stride=size)
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum(dim=0)
        return images_grad, (grad.T @ rows).view_as(weight), bias_grad
