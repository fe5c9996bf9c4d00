"""A real step on the CPU and what torch's allocator handed out for it: `measured_step.py CONFIG`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.distributed.mesh import process_group
from dinov2_core.planning.cost_tracker import CostTracker
from dinov2_core.planning.step import take_step
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.initialization import build_student_teacher


def real_batch(config: TrainingConfig, *, num_masked: int) -> PretrainBatch:
    """Noise, with masked patches spread over all crops."""
    crops, images = config.crops, config.optimization.global_batch_size
    large, small = crops.global_crop_size_pixels, crops.local_crop_size_pixels
    num_patches = (large // config.backbone.patch_size_pixels) ** 2
    masks = torch.zeros(2 * images * num_patches, dtype=torch.bool)
    masks[torch.randperm(masks.shape[0])[:num_masked]] = True
    return PretrainBatch(
        global_crops=torch.randn(2 * images, 3, large, large),
        local_crops=torch.randn(crops.num_local_crops * images, 3, small, small),
        masks=masks.view(2 * images, num_patches),
        masked_indices=masks.nonzero().flatten(),
        mask_weights=torch.full((num_masked,), 0.1),
        num_masked=num_masked,
    )


def allocator_peak(recorded: profile) -> int:
    """Most bytes that the allocator had handed out at once since recording began."""
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def measure(config: TrainingConfig, *, num_masked: int) -> tuple[int, int]:
    """Peak bytes of a real step: as the allocator saw it, and as a tracker did."""
    tracker = CostTracker()
    with (
        process_group() as ranks,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        model = build_student_teacher(config, device=ranks.device)
        shard_student_teacher(model, ranks=ranks)
        optimizer = adamw(model, config=config)
        with tracker:
            tracker.begin_segment("batch")
            batch = real_batch(config, num_masked=num_masked)
            parts = batch.split(config.optimization.accumulation_steps)
            take_step(model, parts, optimizer=optimizer, config=config, tracker=tracker)
    return allocator_peak(recorded), tracker.peak.peak_bytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = TrainingConfig.model_validate_json(Path(sys.argv[1]).read_text())
    allocated, followed = measure(settings, num_masked=int(sys.argv[2]))
    sys.stdout.write(f"{allocated} {followed}\n")
