"""What each of several ranks does in the tests of this folder: `scenarios.py NAME PATH...`."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dinov2_core.config import (
    Backbone,
    Crops,
    Dimensions,
    DinoObjective,
    Head,
    IbotObjective,
    KoleoObjective,
    Optimization,
    TrainingConfig,
)
from dinov2_core.data.crops import CropRecipe
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.masking import MaskRecipe
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.export import export_weights
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.distributed.sharding import Sharding, shard_averaged
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.loop import adamw, shard_student_teacher
from dinov2_core.training.parameter_groups import apply_schedule
from dinov2_core.training.schedules import schedule_at
from dinov2_core.training.step_report import agree_on_numbers
from dinov2_core.training.training_state import training_state

HEAD = Head(num_prototypes=40, bottleneck_dim=8, hidden_dim=24)
CONFIG = TrainingConfig(
    seed=3,
    backbone=Backbone(
        architecture=Dimensions(embed_dim=32, depth=2, num_heads=2),
        patch_size_pixels=4,
        layer_scale=0.5,
        drop_path_rate=0.0,
    ),
    crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8, num_local_crops=2),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    koleo=KoleoObjective(neighbours="global_batch"),
    optimization=Optimization(
        num_steps=10,
        warmup_steps=0,
        global_batch_size=12,
        base_learning_rate=0.01,
        freeze_prototypes_steps=0,
    ),
    precision="fp32",
)


def full(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name. Collective."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors
    }


def loader(shards: Path, ranks: Ranks) -> PretrainLoader:
    return PretrainLoader(
        ShardReader(shards),
        crops=CropRecipe(**CONFIG.crops.model_dump()),
        masks=MaskRecipe(grid_height=4, grid_width=4),
        seed=CONFIG.seed,
        global_batch_size=CONFIG.optimization.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=0,
        num_threads=1,
    )


def take_step(ranks: Ranks, shards: Path, output: Path, checkpoints: Path) -> None:
    """One whole step; writes losses, gradients and weights, a checkpoint and the teacher."""
    model = build_student_teacher(CONFIG, device=ranks.device)
    before = full(model.student.named_parameters())
    shard_student_teacher(model, ranks=ranks)
    optimizer = adamw(model, config=CONFIG)
    schedule = schedule_at(0, config=CONFIG)
    batch = loader(shards, ranks).make_batch(0)
    losses = model(batch, teacher_temperature=schedule.teacher_temperature)
    losses.total.backward()
    gradients = full((n, p.grad) for n, p in model.student.named_parameters())
    norms = model.clip_gradients(CONFIG.optimization.clip_norm)
    numbers = agree_on_numbers(losses, norms=norms, must_stop=ranks.rank == 1, step=0, ranks=ranks)
    apply_schedule(optimizer, schedule=schedule)
    optimizer.step()
    model.update_teacher(0.5)
    state = training_state(model, optimizer=optimizer)
    save_checkpoint(state, directory=checkpoints, step=1, identity="test", keep_last=1)
    sha256 = export_weights(model.teacher, path=checkpoints / "teacher.safetensors")
    whole = full(state.items())
    errors = errors_of_teachers(ranks)
    if ranks.is_main_rank:
        result = {
            "losses": numbers.losses,
            "norms": numbers.gradient_norms,
            "must_stop": numbers.must_stop,
            "gradients": gradients,
            "before": before,
            "state": whole,
            "sha256": sha256,
            "teacher_errors": errors,
        }
        torch.save(result, output)


def load_state(ranks: Ranks, checkpoints: Path, output: Path) -> None:
    """Fill a fresh run from a checkpoint that another number of ranks wrote."""
    model = build_student_teacher(CONFIG.model_copy(update={"seed": 9}), device=ranks.device)
    shard_student_teacher(model, ranks=ranks)
    optimizer = adamw(model, config=CONFIG)
    checkpoint = newest_checkpoint(checkpoints)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.identity) == (1, "test")
    load_checkpoint(training_state(model, optimizer=optimizer), checkpoint=checkpoint)
    state = full(training_state(model, optimizer=optimizer).items())
    if ranks.is_main_rank:
        torch.save(state, output)


def error_after_moving_average(module: nn.Module, whole: nn.Module, images: Tensor) -> float:
    """Change shards held since before a forward pass; how far the next forward pass is off."""
    torch.manual_seed(0)
    targets = [torch.randn_like(p) for p in whole.parameters()]
    mesh = next(module.parameters()).device_mesh
    shards = [p.to_local() for p in module.parameters()]
    with torch.no_grad():
        module([images])
        for shard, parameter, target in zip(shards, whole.parameters(), targets, strict=True):
            shard.copy_(distribute_tensor(target, mesh, [Shard(0)]).to_local())
            parameter.copy_(target)
        return float((module([images])[0].cls - whole([images])[0].cls).abs().max())


def errors_of_teachers(ranks: Ranks) -> list[float]:
    """Errors after a moving average: sharded as a teacher, and with FSDP's default for roots."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(ranks.rank))
    errors = []
    for is_default in (False, True):
        teacher = build_student_teacher(CONFIG, device=ranks.device).teacher.backbone
        whole = copy.deepcopy(teacher)
        if is_default:
            fully_shard(teacher, mesh=ranks.mesh)
        else:
            shard_averaged(
                [teacher],
                blocks=teacher.blocks,
                mesh=ranks.mesh,
                sharding=Sharding(precision="fp32"),
            )
        errors.append(error_after_moving_average(teacher, whole, images))
    return errors


def die_while_saving(_ranks: Ranks, checkpoints: Path) -> None:
    """Save one checkpoint, then be killed as soon as the second one begins to exist."""

    def kill_when_begun() -> None:
        while not any(checkpoints.glob("*.partial/__0_0.distcp")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    save_checkpoint(
        {"weight": torch.ones(4)}, directory=checkpoints, step=1, identity="test", keep_last=2
    )
    threading.Thread(target=kill_when_begun, daemon=True).start()
    save_checkpoint(
        {"weight": torch.zeros(30_000_000)},
        directory=checkpoints,
        step=2,
        identity="test",
        keep_last=2,
    )


SCENARIOS = {
    "take_step": take_step,
    "load_state": load_state,
    "die_while_saving": die_while_saving,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(timeout_seconds=60) as ranks:
        SCENARIOS[sys.argv[1]](ranks, *map(Path, sys.argv[2:]))
