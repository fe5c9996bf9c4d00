"""First weights of student and teacher, drawn from the seed."""

from __future__ import annotations

import torch

from dinov2_core.config.training import TrainingConfig
from dinov2_core.training.student_teacher import StudentTeacher


def build_student_teacher(config: TrainingConfig, *, device: torch.device) -> StudentTeacher:
    """Student and teacher with equal weights, whole on this device, the same on every rank.

    Drawn from the seed on the device, whatever the number of ranks; nothing is communicated.
    Positions belong to the global crop of the settings.

    Args:
        config: What is learned.
        device: Where the weights lie; CPU and CUDA draw different numbers.

    Returns:
        The model, in training mode.
    """
    with torch.device("meta"):
        model = StudentTeacher(config, image_size_pixels=config.crops.global_crop_size_pixels)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights(torch.Generator(device).manual_seed(config.seed))
    forgotten = [name for name, p in model.state_dict().items() if not torch.isfinite(p).all()]
    assert not forgotten, forgotten
    model.train()
    return model
