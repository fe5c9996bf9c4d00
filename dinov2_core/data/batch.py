"""PretrainBatch: what one rank needs for one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    """[M] float32: 1 / number of masked patches of the crop the patch belongs to."""
    num_masked: int
    """M, known without asking the device."""

    def to(self, device: torch.device) -> PretrainBatch:
        """The same batch on another device; copies from pinned memory do not block."""
        return PretrainBatch(
            global_crops=self.global_crops.to(device, non_blocking=True),
            local_crops=self.local_crops.to(device, non_blocking=True),
            masks=self.masks.to(device, non_blocking=True),
            masked_indices=self.masked_indices.to(device, non_blocking=True),
            mask_weights=self.mask_weights.to(device, non_blocking=True),
            num_masked=self.num_masked,
        )
