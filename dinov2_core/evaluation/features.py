"""Frozen features of a backbone over many images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class BackboneFeatures(Protocol):
    """What a backbone says about a batch."""

    @property
    def cls(self) -> Tensor:
        """Cls tokens [B, D]."""

    @property
    def patches(self) -> Tensor:
        """Patch tokens [B, N, D]."""


class Backbone(Protocol):
    """Anything that turns normalised images [B, C, H, W] into features."""

    def __call__(self, images: Tensor, /) -> BackboneFeatures:
        """Return the features of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedFeatures:
    """Features of N images, float32 on the CPU."""

    cls: Tensor
    """Cls tokens [N, D]."""
    patch_mean: Tensor | None
    """Mean of the patch tokens [N, D], where it was asked for."""


def extract_features(
    backbone: Backbone,
    *,
    batches: Iterable[Tensor],
    total: int,
    device: torch.device,
    has_patch_mean: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ExtractedFeatures:
    """Run a backbone over batches without gradient and keep its features.

    Evaluation mode and compute precision are the caller's: the backbone is called as it is.

    Args:
        backbone: Called with each batch, on the device.
        batches: Normalised images [B, C, H, W].
        total: Images in all batches together; held against what arrives.
        device: Where the backbone lives.
        has_patch_mean: Also keep the mean patch token of every image.
        progress: Called after each batch with the images done and the total.

    Raises:
        ValueError: A feature is not finite, or another number of images arrived than announced.
    """
    cls: list[Tensor] = []
    patch_means: list[Tensor] = []
    done = 0
    with torch.no_grad():
        for batch in batches:
            features = backbone(batch.to(device))
            cls.append(_finite(features.cls, first=done))
            if has_patch_mean:
                patch_means.append(_finite(features.patches.float().mean(dim=1), first=done))
            done += len(batch)
            progress(done, total)
    if done != total or not done:
        raise ValueError(
            f"{done} images arrived but {total} were announced; pass batches of all images, at "
            "least one, and their number as total"
        )
    return ExtractedFeatures(
        cls=torch.cat(cls), patch_mean=torch.cat(patch_means) if has_patch_mean else None
    )


def _finite(features: Tensor, *, first: int) -> Tensor:
    features = features.float().cpu()
    if not features.isfinite().all():
        bad = first + int((~features.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(
            f"features of image {bad} (counted from 0) are not finite; the backbone's weights or "
            "its compute precision are at fault"
        )
    return features
