"""What steps and collectives of gloo ranks take here: `timed_ranks.py CONFIG`, by torchrun's variables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dinov2_core.config.training import TrainingConfig
from dinov2_core.distributed.mesh import process_group
from dinov2_core.planning.step import masked_patches
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.initialization import build_student_teacher
from tests.dinov2_core.planning.measured_step import real_batch

NUM_FLOATS = 5_000_000


def shortest(action: Callable[[], object], *, repeats: int) -> float:
    """Least seconds of some repetitions, so that other people's load counts least."""
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(config: TrainingConfig) -> dict[str, float]:
    """Seconds of a step and of a tiny reduction, and bytes per second of a ring's gather."""
    with process_group() as ranks:
        world = ranks.world_size
        model = build_student_teacher(config, device=ranks.device)
        shard_student_teacher(model, ranks=ranks)
        optimizer = adamw(model, config=config)
        num_masked = masked_patches(config, world_size=1) // world
        images = config.optimization.global_batch_size // world
        share = config.optimization.model_copy(update={"global_batch_size": images})
        own = config.model_copy(update={"optimization": share})
        batch = real_batch(own, num_masked=num_masked)

        def step() -> None:
            optimizer.zero_grad()
            accumulate_gradients(model, (batch,), teacher_temperature=0.05)
            model.clip_gradients(3.0)
            optimizer.step()
            model.update_teacher(0.99)

        part, whole, tiny = (torch.zeros(n) for n in (NUM_FLOATS, NUM_FLOATS * world, 8))
        gather = shortest(lambda: dist.all_gather_into_tensor(whole, part), repeats=8)
        return {
            "step_seconds": shortest(step, repeats=14),
            "bytes_per_second": 4 * NUM_FLOATS * (world - 1) / gather,
            "latency_seconds": shortest(lambda: dist.all_reduce(tiny), repeats=30),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = TrainingConfig.model_validate_json(Path(sys.argv[1]).read_text())
    sys.stdout.write("\n" + json.dumps(measure(settings)) + "\n")
