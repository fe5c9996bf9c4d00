"""What the teacher must beat: raw pixels, and its own architecture before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFeatures:
    """Pixels in the place of tokens, so that they are measured like a backbone."""

    cls: Tensor
    """All values of an image [B, C * H * W]."""
    patches: Tensor
    """One token per pixel [B, H * W, C]."""


def raw_pixels(images: Tensor) -> PixelFeatures:
    """Return normalised images [B, C, H, W] as features of a backbone that does nothing."""
    return PixelFeatures(cls=images.flatten(1), patches=images.flatten(2).transpose(1, 2))


def untrained(build: Callable[[], Module], *, seed: int) -> Module:
    """Build a network with seeded random weights, in evaluation mode and without gradients.

    The process's own random state is left as it was. An untrained teacher has LayerScale 1e-5: its
    cls tokens differ little, which `knn` and `logistic` are built to resolve.

    Args:
        build: Makes the network on the CPU, drawing its weights from torch's default generator.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = build()
    return module.eval().requires_grad_(False)
