"""First weights of student and teacher: from the seed, or from an exported teacher."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from dinov2_core.config import TrainingConfig
from dinov2_core.distributed.export import LoadReport, load_teacher_weights
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.vit.patch_embed import PatchGrid
from dinov2_core.vit.position import resample_positions

logger = logging.getLogger(__name__)


def build_student_teacher(
    config: TrainingConfig, *, device: torch.device, starting_weights: Path | None = None
) -> StudentTeacher:
    """Student and teacher with equal weights, whole on this device, the same on every rank.

    Drawn from the seed on the device, whatever the number of ranks; nothing is communicated.
    Positions belong to the global crop of the settings.

    Args:
        config: What is learned.
        device: Where the weights lie; CPU and CUDA draw different numbers.
        starting_weights: Exported teacher that replaces backbone and heads of both; positions of
            another grid are resampled.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: The starting weights do not fit.
    """
    with torch.device("meta"):
        model = StudentTeacher(config, image_size_pixels=config.crops.global_crop_size_pixels)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights(torch.Generator(device).manual_seed(config.seed))
    if starting_weights is not None:
        report = load_teacher_weights(
            model.student, path=starting_weights, resample=resample_to_side
        )
        model.copy_student_to_teacher()
        _log(report, path=starting_weights)
    forgotten = [name for name, p in model.state_dict().items() if not torch.isfinite(p).all()]
    assert not forgotten, forgotten
    model.train()
    return model


def resample_to_side(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + M * M, D] on a grid of side x side patches, bicubic."""
    grid = PatchGrid(height=side, width=side)
    return resample_positions(positions, grid=grid, offset=0.0, antialias=True)


def _log(report: LoadReport, *, path: Path) -> None:
    resampled = f", resampled {', '.join(report.resampled)}" if report.resampled else ""
    logger.info("starting from %s: %d parameters%s", path, len(report.loaded), resampled)
