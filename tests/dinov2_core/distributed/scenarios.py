"""What each of several ranks does in the tests of this folder: `scenarios.py NAME PATH...`."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.execution import Checkpoints, Execution
from dinov2_core.config.objectives import (
    DinoObjective,
    Head,
    IbotObjective,
    KoleoObjective,
    SharedHead,
    SoftmaxCentering,
)
from dinov2_core.config.training import Crops, Optimization, TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.checkpoint_writer import CheckpointWriter
from dinov2_core.distributed.export import export_weights
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.distributed.sharding import shard_teacher
from dinov2_core.errors import CheckpointError
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.batches import mask_recipe
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.parameter_groups import apply_schedule
from dinov2_core.training.schedules import schedule_at
from dinov2_core.training.step_report import PendingNumbers
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
        crops=CONFIG.crops,
        masks=mask_recipe(CONFIG),
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
    losses = accumulate_gradients(model, [batch], teacher_temperature=schedule.teacher_temperature)
    gradients = full((n, p.grad) for n, p in model.student.named_parameters())
    norms = model.clip_gradients(CONFIG.optimization.clip_norm)
    numbers = PendingNumbers(losses, norms=norms, must_stop=ranks.rank == 1, ranks=ranks).read()
    apply_schedule(optimizer, schedule=schedule)
    optimizer.step()
    model.update_teacher(0.5)
    state = training_state(model, optimizer=optimizer)
    save_checkpoint(
        state, directory=checkpoints, step=1, identity="test", retention=Checkpoints(keep_last=1)
    )
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
            shard_teacher(
                [teacher],
                blocks=teacher.blocks,
                mesh=ranks.mesh,
                precision="fp32",
                execution=Execution(),
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
        {"weight": torch.ones(4)},
        directory=checkpoints,
        step=1,
        identity="test",
        retention=Checkpoints(keep_last=2),
    )
    threading.Thread(target=kill_when_begun, daemon=True).start()
    save_checkpoint(
        {"weight": torch.zeros(30_000_000)},
        directory=checkpoints,
        step=2,
        identity="test",
        retention=Checkpoints(keep_last=2),
    )


def die_in_background(_ranks: Ranks, checkpoints: Path) -> None:
    """Save one checkpoint, then be killed while the second one is written behind training."""
    with CheckpointWriter(
        checkpoints, identity="test", retention=Checkpoints(keep_last=1)
    ) as writer:
        writer.save({"weight": torch.ones(4)}, step=1)
        writer.save({"weight": torch.zeros(30_000_000)}, step=2)
        while not any(checkpoints.glob("*.partial/__0_0.distcp")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)


def gradients_of(
    ranks: Ranks,
    shards: Path,
    *,
    num_parts: int = 1,
    num_padded: int = 0,
    **settings: object,
) -> dict[str, Tensor]:
    """Losses and whole gradients of the first batch, computed in parts. Collective."""
    config = CONFIG.model_copy(update=settings)
    model = build_student_teacher(config, device=ranks.device)
    shard_student_teacher(model, ranks=ranks)
    parts = loader(shards, ranks).make_batch(0).split(num_parts)
    if num_padded:
        parts = tuple(part.padded(num_padded) for part in parts)
    torch.manual_seed(0)
    losses = accumulate_gradients(model, parts, teacher_temperature=0.05)
    state = full((n, p.grad) for n, p in model.student.named_parameters())
    return state | {
        f"losses/{name}": ranks.gather(loss[None]).mean() for name, loss in losses.by_name().items()
    }


OTHER = {
    "koleo": KoleoObjective(neighbours="rank"),
    "ibot": IbotObjective(head=SharedHead()),
    "centering": SoftmaxCentering(),
}
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "two parts": ({}, {"num_parts": 2}),
    "three parts": ({}, {"num_parts": 3}),
    "three parts, other objective": (OTHER, {"num_parts": 3}),
    "three parts without koleo": ({"koleo": None}, {"num_parts": 3}),
    "padded": ({}, {"num_padded": 300}),
    "padded, other objective": (OTHER, {"num_padded": 300}),
    "two padded parts": ({}, {"num_parts": 2, "num_padded": 150}),
    "full recomputation": ({}, {"execution": Execution(recomputes_activations="full")}),
    "selective recomputation in parts": (
        {},
        {"execution": Execution(recomputes_activations="selective"), "num_parts": 2},
    ),
    "compiled": ({}, {"execution": Execution(compiles_blocks=True)}),
    "compiled with recomputation": (
        {},
        {"execution": Execution(compiles_blocks=True, recomputes_activations="selective")},
    ),
}


def take_variants(ranks: Ranks, shards: Path, output: Path, kind: Path) -> None:
    """Largest relative errors of losses and of whole gradients against the plain computation.

    Relative, because a bias before the normalisation of a fresh head has gradients of thousands.
    """
    errors: dict[str, dict[str, float]] = {}
    batch_size_per_rank = CONFIG.optimization.global_batch_size // ranks.world_size

    def compare(name: str, plain: dict[str, Tensor], variant: dict[str, Tensor]) -> None:
        assert plain.keys() == variant.keys()
        found = {
            key: float((variant[key] - plain[key]).norm() / plain[key].norm().clamp(min=1e-9))
            for key in plain
        }
        losses = {key: error for key, error in found.items() if key.startswith("losses/")}
        worst = max(found.keys() - losses.keys(), key=found.__getitem__)
        errors[name] = {"losses": max(losses.values()), "gradients": found[worst]}

    for name, (settings, changes) in VARIANTS.items():
        divides = batch_size_per_rank % changes.get("num_parts", 1) == 0  # type: ignore[operator]
        if divides and name.startswith("compiled") == (kind.name == "compiled"):
            plain = gradients_of(ranks, shards, **settings)  # type: ignore[arg-type]
            compare(name, plain, gradients_of(ranks, shards, **settings | changes))  # type: ignore[arg-type]
    if kind.name != "compiled":
        plain = gradients_of(ranks, shards)
        for num_replicas in range(2, ranks.world_size + 1):
            if ranks.world_size % num_replicas == 0:
                shape = (num_replicas, ranks.world_size // num_replicas)
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
                replicas = dataclasses.replace(ranks, mesh=mesh)
                compare(f"{num_replicas} replicas", plain, gradients_of(replicas, shards))
                parts = gradients_of(replicas, shards, num_parts=3)
                compare(f"{num_replicas} replicas in parts", plain, parts)
        errors["failure"] = {str(ranks.rank): float(fails_together(ranks, output))}
    if ranks.is_main_rank:
        torch.save(errors, output)


def fails_together(ranks: Ranks, output: Path) -> bool:
    """Whether this rank learns that the last rank cannot write."""
    directory = output.with_suffix(".checkpoints")
    retention = Checkpoints(keep_last=1)
    state = {"weight": torch.ones(3)}
    with CheckpointWriter(directory, identity="test", retention=retention) as writer:
        writer.save(state, step=1)
        writer.wait()
        if ranks.is_main_rank:
            (directory / "step_00000002").write_text("in the way")
        writer.save(state, step=2)
        try:
            writer.wait()
        except CheckpointError:
            return newest_checkpoint(directory).step == 1  # type: ignore[union-attr]
    return False


class Watched:
    """A loader that notes the images of every batch it hands out, by their red level."""

    def __init__(self, loader: PretrainLoader, seen: list[list[int]]) -> None:
        self._loader = loader
        self._seen = seen

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_error: object) -> None:
        self._loader.close()

    def __next__(self) -> PretrainBatch:
        batch = next(self._loader)
        crop = batch.global_crops[: batch.global_crops.shape[0] // 2, 0].mean((1, 2))
        red = crop * CONFIG.crops.standard_deviation[0] + CONFIG.crops.mean[0]
        self._seen.append((red * 255 / RED_STEP).round().int().tolist())
        return batch


RED_STEP = 10


class WatchedRun(TrainingRun):
    seen: list[list[int]]

    def _loader(self, reader: ShardReader, *, num_threads: int) -> Any:
        self.seen = []
        return Watched(super()._loader(reader, num_threads=num_threads), self.seen)


PLAIN_CROPS = {
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "solarize_probability": 0.0,
    "blur_probabilities": (0.0, 0.0, 0.0),
}
LONG = CONFIG.model_copy(
    update={
        "crops": CONFIG.crops.model_copy(update=PLAIN_CROPS),
        "optimization": CONFIG.optimization.model_copy(
            update={"num_steps": 6, "warmup_steps": 3, "base_learning_rate": 0.002}
        ),
        "checkpoints": Checkpoints(every_steps=2, keep_last=9),
    }
)


def train(ranks: Ranks, shards: Path, *runs: Path) -> None:
    """Train runs, each given as directory, output and last step."""
    for first in range(0, len(runs), 3):
        train_until(ranks, shards, *runs[first : first + 3])


def train_until(
    ranks: Ranks, shards: Path, checkpoints: Path, output: Path, last_step: Path
) -> None:
    """Train up to a step, from a checkpoint if there is one; losses and images of every step."""
    run = WatchedRun(LONG, ranks=ranks, checkpoints=checkpoints)
    steps = run.steps(
        shards=shards,
        loader_threads=1,
        should_stop=lambda: run.num_steps_done + 1 == int(last_step.name),
    )
    losses = [report.losses for report in steps]
    seen: list[list[list[int]]] = [[] for _ in range(ranks.world_size)]
    torch.distributed.all_gather_object(seen, run.seen)
    if ranks.is_main_rank:
        images = [[i for part in parts for i in part] for parts in zip(*seen, strict=True)]
        torch.save({"first": run.first_step, "losses": losses, "images": images}, output)


SCENARIOS = {
    "train": train,
    "take_variants": take_variants,
    "take_step": take_step,
    "load_state": load_state,
    "die_while_saving": die_while_saving,
    "die_in_background": die_in_background,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(timeout_seconds=60) as ranks:
        SCENARIOS[sys.argv[1]](ranks, *map(Path, sys.argv[2:]))
