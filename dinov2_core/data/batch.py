"""PretrainBatch: what one rank needs for one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainBatch:
    """Crops and masks of the images of one rank; B images, N patches of a global crop."""

    global_crops: Tensor
    """[2B, C, H, W] float32: crop 0 of every image, then crop 1 of every image."""
    local_crops: Tensor
    """[L*B, C, h, w] float32: local crop 0 of every image, then local crop 1, and so on."""
    masks: Tensor
    """[2B, N] bool, true where the student does not see the patch."""
    masked_indices: Tensor
    """[M] int64: masked patches counted through the flattened [2B * N]."""
    mask_weights: Tensor
    """[M] float32: 1 / number of masked patches of the crop the patch belongs to; 0 for rows that
    only pad, which stand at the end."""
    num_masked: int
    """Masked patches, known without asking the device; M less the rows that only pad."""

    def to(self, device: torch.device) -> PretrainBatch:
        """The same batch on another device, on CUDA from pinned memory, which does not block."""
        is_cuda = device.type == "cuda"

        def moved(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if is_cuda else tensor).to(device, non_blocking=True)

        return PretrainBatch(
            global_crops=moved(self.global_crops),
            local_crops=moved(self.local_crops),
            masks=moved(self.masks),
            masked_indices=moved(self.masked_indices),
            mask_weights=moved(self.mask_weights),
            num_masked=self.num_masked,
        )

    def split(self, num_parts: int) -> tuple[PretrainBatch, ...]:
        """Equal parts of neighbouring images with all their crops; on the CPU, before `padded`.

        Raises:
            ValueError: The images do not divide into so many parts.
        """
        num_crops, num_patches = self.masks.shape
        num_images = num_crops // 2
        if num_images % num_parts:
            raise ValueError(
                f"{num_images} images of a rank do not divide into {num_parts} parts; set "
                f"optimization.accumulation_steps to a divisor of {num_images}"
            )
        if num_parts == 1:
            return (self,)
        size = num_images // num_parts
        crop, patch = self.masked_indices // num_patches, self.masked_indices % num_patches
        parts = []
        for first in range(0, num_images, size):
            image = crop % num_images - first
            is_own = (image >= 0) & (image < size)
            rows = ((crop // num_images * size + image) * num_patches + patch)[is_own]
            parts.append(
                PretrainBatch(
                    global_crops=_of_images(self.global_crops, num_images, first, size),
                    local_crops=_of_images(self.local_crops, num_images, first, size),
                    masks=_of_images(self.masks, num_images, first, size),
                    masked_indices=rows,
                    mask_weights=self.mask_weights[is_own],
                    num_masked=rows.shape[0],
                )
            )
        return tuple(parts)

    def padded(self, num_rows: int) -> PretrainBatch:
        """The same batch with masked patches filled up to so many rows of weight 0."""
        missing = num_rows - self.masked_indices.shape[0]
        assert missing >= 0, (num_rows, self.masked_indices.shape)
        return replace(
            self,
            masked_indices=F.pad(self.masked_indices, (0, missing)),
            mask_weights=F.pad(self.mask_weights, (0, missing)),
        )


def _of_images(crops: Tensor, num_images: int, first: int, size: int) -> Tensor:
    """Crops [c * B, ..] of some images as [c * size, ..]."""
    by_image = crops.view(crops.shape[0] // num_images, num_images, *crops.shape[1:])
    return by_image[:, first : first + size].flatten(0, 1)
