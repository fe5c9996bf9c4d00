"""Small settings whose step is measured."""

from __future__ import annotations

from typing import Literal

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.execution import Execution
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective
from dinov2_core.config.training import Crops, Optimization, TrainingConfig


def small_config(
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    recomputes: Literal["none", "selective", "full"] = "none",
    accumulation_steps: int = 1,
    global_batch_size: int = 16,
    global_crop_size_pixels: int = 112,
    embed_dim: int = 192,
    depth: int = 4,
) -> TrainingConfig:
    """By default four blocks: some ten megabytes of parameters and of activations."""
    head = Head(num_prototypes=2048, bottleneck_dim=64, hidden_dim=256)
    return TrainingConfig(
        backbone=Backbone(
            architecture=Dimensions(embed_dim=embed_dim, depth=depth, num_heads=4),
            patch_size_pixels=14,
        ),
        crops=Crops(
            global_crop_size_pixels=global_crop_size_pixels,
            local_crop_size_pixels=56,
            num_local_crops=4,
        ),
        dino=DinoObjective(head=head),
        ibot=IbotObjective(head=head),
        optimization=Optimization(
            num_steps=10,
            warmup_steps=0,
            global_batch_size=global_batch_size,
            accumulation_steps=accumulation_steps,
        ),
        precision=precision,
        execution=Execution(recomputes_activations=recomputes),
    )
