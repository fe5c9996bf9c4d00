"""From the loop to the loss there are few frames: who reads a traceback sees the method."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

import dinov2_core
from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective
from dinov2_core.config.training import Crops, Optimization, TrainingConfig
from dinov2_core.data.shards import ShardWriter
from dinov2_core.distributed.mesh import process_group
from dinov2_core.losses.dino import dino_loss
from dinov2_core.training.loop import TrainingRun

PACKAGE = str(Path(dinov2_core.__file__).parent)
CHAIN = ["steps", "_step", "accumulate_gradients", "forward", "dino_loss"]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_five_frames_lead_from_the_steps_to_the_cross_entropy(
    tmp_path: Path, accumulation_steps: int
) -> None:
    with ShardWriter(tmp_path / "shards", target_size_bytes=4000) as writer:
        for level in range(4):
            buffer = io.BytesIO()
            pixels = np.full((20, 20, 3), 20 * level, dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=20, height=20)
    head = Head(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)
    config = TrainingConfig(
        backbone=Backbone(
            architecture=Dimensions(embed_dim=16, depth=1, num_heads=2), patch_size_pixels=4
        ),
        crops=Crops(global_crop_size_pixels=8, local_crop_size_pixels=4, num_local_crops=1),
        dino=DinoObjective(head=head),
        ibot=IbotObjective(head=head),
        optimization=Optimization(
            num_steps=1,
            warmup_steps=0,
            global_batch_size=4,
            accumulation_steps=accumulation_steps,
        ),
        precision="fp32",
    )
    chains: list[list[str]] = []

    def profiled(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_code is not dino_loss.__code__:
            return
        chain = []
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_filename.startswith(PACKAGE):
                chain.append(caller.f_code.co_name)
            caller = caller.f_back
        chains.append(chain[::-1])

    with process_group() as ranks:
        run = TrainingRun(config, ranks=ranks, checkpoints=tmp_path / "checkpoints")
        steps = run.steps(shards=tmp_path / "shards", loader_threads=1)
        sys.setprofile(profiled)
        try:
            next(steps)
        finally:
            sys.setprofile(None)
        steps.close()  # type: ignore[attr-defined]
    assert chains == [CHAIN] * accumulation_steps
