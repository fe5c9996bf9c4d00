"""The end of a step: optimizer and moving average move, or nothing does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW

from dinov2_core.training.parameter_groups import apply_schedule
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.student_teacher import StudentTeacher


@torch.no_grad()
def update_or_skip(
    model: StudentTeacher,
    optimizer: AdamW,
    *,
    schedule: StepSchedule,
    centres: Sequence[Tensor],
    is_skipped: bool | Tensor,
) -> None:
    """Take the optimizer step and update the teacher; a skipped step changes nothing.

    Both ways give the same weights bit for bit. With a tensor the device decides and the host
    does not wait for it: fused AdamW leaves weights, moments and step counts alone where its
    `found_inf` is 1, and the teacher gets 0 times the student.

    Args:
        model: With the gradients of the step.
        optimizer: Of the student, fused.
        schedule: Of the step.
        centres: Copies of the model's buffers from before the step.
        is_skipped: Known on the host, or a scalar bool on the device.
    """
    if is_skipped is True:
        for buffer, before in zip(model.buffers(), centres, strict=True):
            buffer.copy_(before)
        return
    on_device = is_skipped if isinstance(is_skipped, Tensor) else None
    if on_device is not None:
        for buffer, before in zip(model.buffers(), centres, strict=True):
            buffer.copy_(torch.where(on_device, before, buffer))
    optimizer.found_inf = None if on_device is None else on_device.float()  # type: ignore[attr-defined]
    apply_schedule(optimizer, schedule=schedule)
    optimizer.step()
    model.update_teacher(
        schedule.teacher_momentum,
        is_backbone_frozen=schedule.is_backbone_frozen,
        is_skipped=on_device,
    )
