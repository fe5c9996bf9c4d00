"""One training step through the real model, sharding and optimizer, on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.device_kind import planned_for
from dinov2_core.distributed.mesh import Ranks, device_mesh
from dinov2_core.distributed.sharding import prefetch
from dinov2_core.planning.cost_tracker import CostTracker
from dinov2_core.planning.extrapolation import StepTrace, extrapolated
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.batches import mask_recipe
from dinov2_core.training.parameter_groups import apply_schedule
from dinov2_core.training.schedules import schedule_at
from dinov2_core.training.student_teacher import StudentTeacher

CROP_DEVIATIONS = 3.0
"""Standard deviations above the mean that a rank's masked patches are planned with."""
SHALLOW_DEPTH = 4
"""Of the smaller model that a deep one is extrapolated from: two blocks have neighbours."""
DEEP = 16
"""Blocks from which on two shallow models are traced instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one optimizer step takes on one rank."""

    peak_bytes: int
    """Most memory that tensors hold at once."""
    memory_bytes: Mapping[str, int]
    """The same by purpose: student, teacher, optimizer, gradients, gathered parameters, batch,
    activations, heads and losses, backward."""
    flops: Mapping[str, int]
    """Operations of matrix products, attention and convolutions by type of the factors."""
    moved_bytes: int
    """Memory read and written by all other operations."""
    sent_bytes: Mapping[str, int]
    """Whole tensors, all ranks' parts together, by collective."""
    calls: Mapping[str, int]
    """Number of collectives by kind."""

    @classmethod
    def of(cls, trace: StepTrace) -> StepCost:
        """The cost of a traced step; its peak is the first of the largest."""
        peak = max(trace.segments, key=lambda segment: segment.peak_bytes)
        return cls(
            peak_bytes=peak.peak_bytes,
            memory_bytes=peak.memory_bytes,
            flops=trace.flops,
            moved_bytes=trace.moved_bytes,
            sent_bytes=trace.sent_bytes,
            calls=trace.calls,
        )


def trace_step(
    config: TrainingConfig,
    *,
    world_size: int,
    num_replicas: int = 1,
    kind: Literal["cuda", "cpu"] = "cuda",
    num_masked: int | None = None,
    extrapolates: bool = True,
) -> StepCost:
    """Memory, work and traffic of one step of one rank, without data, device or other ranks.

    Student and teacher are built, sharded over ranks that do not exist and stepped once by the
    code that trains, under torch's fake tensors. Of a deep model two shallow ones are traced and
    extrapolated, which gives the same numbers. Not counted is what no tensor holds: the device's
    context, buffers of NCCL and cuBLAS, fragments of the allocator, temporary memory inside
    kernels. Compiled blocks are counted as if they were not compiled.

    Args:
        config: What is learned; its global batch is divided over the ranks.
        world_size: Ranks in all.
        num_replicas: Copies of the model; divides world_size.
        kind: Device whose attention and losses are traced.
        num_masked: Masked patches of the rank; None is `masked_patches`.
        extrapolates: False traces a deep model as it is.
    """
    execution = config.execution.model_copy(
        update={"compiles_blocks": False, "attention_kernel": "per_group"}
    )
    config = config.model_copy(update={"execution": execution})
    if num_masked is None:
        num_masked = masked_patches(config, world_size=world_size)

    def trace(depth: int) -> StepTrace:
        return _trace(
            _with_depth(config, depth),
            world_size=world_size,
            num_replicas=num_replicas,
            kind=kind,
            num_masked=num_masked,
        )

    depth = config.backbone.dimensions.depth
    if depth < DEEP or not extrapolates:
        return StepCost.of(trace(depth))
    shallow, deeper = trace(SHALLOW_DEPTH), trace(SHALLOW_DEPTH + 1)
    return StepCost.of(extrapolated(shallow, deeper, num_more=depth - SHALLOW_DEPTH))


def _with_depth(config: TrainingConfig, depth: int) -> TrainingConfig:
    dimensions = config.backbone.dimensions.model_copy(update={"depth": depth})
    backbone = config.backbone.model_copy(update={"architecture": dimensions})
    return config.model_copy(update={"backbone": backbone})


def _trace(
    config: TrainingConfig,
    *,
    world_size: int,
    num_replicas: int,
    kind: Literal["cuda", "cpu"],
    num_masked: int,
) -> StepTrace:
    num_images = config.optimization.global_batch_size // world_size
    with (
        _absent_ranks(world_size=world_size, num_replicas=num_replicas) as ranks,
        planned_for(kind),
    ):
        model = _sharded(config, ranks=ranks, kind=kind)
        tracker = CostTracker(rows=num_images)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            _fill(model)
            tracker.begin_segment("batch")
            batches = _batches(config, num_images=num_images, num_masked=num_masked)
            optimizer = adamw(model, config=config)
            take_step(model, batches, optimizer=optimizer, config=config, tracker=tracker)
    return StepTrace.of(tracker)


def take_step(
    model: StudentTeacher,
    batches: Sequence[PretrainBatch],
    *,
    optimizer: AdamW,
    config: TrainingConfig,
    tracker: CostTracker,
) -> None:
    """The step of `TrainingRun` under a tracker: gradients, clipping, AdamW, moving average."""
    tracker.tag(model.student.parameters(), "student")
    tracker.tag(model.teacher.parameters(), "teacher")
    moments = (value for state in optimizer.state.values() for value in state.values())
    tracker.tag(moments, "optimizer")

    def begin(purpose: str) -> Callable[..., None]:
        return lambda *_: tracker.begin_segment(purpose)

    for backbone in (model.student.backbone, model.teacher.backbone):
        backbone.register_forward_pre_hook(begin("activations"), prepend=True)
        backbone.register_forward_hook(begin("heads and losses"))
        for block in backbone.blocks:
            _begin_segments_at(block, tracker)
    tracker.restart("batch")
    schedule = schedule_at(0, config=config)
    accumulate_gradients(
        model,
        batches,
        teacher_temperature=schedule.teacher_temperature,
        before_backward=begin("backward"),
    )
    gradients = (p.grad for p in model.student.parameters() if p.grad is not None)
    tracker.tag(gradients, "gradients")
    tracker.begin_segment("optimizer")
    model.clip_gradients(config.optimization.clip_norm)
    apply_schedule(optimizer, schedule=schedule)
    tracker.begin_segment()
    optimizer.step()
    tracker.begin_segment()
    model.update_teacher(schedule.teacher_momentum)


def _begin_segments_at(block: nn.Module, tracker: CostTracker) -> None:
    """Start a segment where a block's forward pass ends, and where its backward pass begins."""

    def begin(_: Tensor) -> None:
        tracker.begin_segment()

    def end_of_forward(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        tracker.begin_segment()
        if output.requires_grad:
            output.register_hook(begin)  # type: ignore[no-untyped-call]

    block.register_forward_hook(end_of_forward)


def masked_patches(config: TrainingConfig, *, world_size: int) -> int:
    """Masked patches of a rank that hardly any step exceeds: mean and three deviations.

    A single rank has all crops of the batch, so that the number hardly varies.
    """
    optimization, masking = config.optimization, config.masking
    num_crops = 2 * optimization.global_batch_size // world_size
    recipe = mask_recipe(config)
    edges = recipe.edges(optimization.global_batch_size)
    most = recipe.most_masked(num_crops, global_batch_size=optimization.global_batch_size)
    if config.execution.pads_masked_patches:
        return most
    ratios = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    share = masking.probability
    mean = share * float(ratios.mean()) if len(ratios) else 0.0
    square = share * float(ratios.square().mean()) if len(ratios) else 0.0
    deviation = math.sqrt(max(square - mean**2, 0.0) * num_crops * (1 - 1 / world_size))
    num_patches = recipe.grid_height * recipe.grid_width
    return min(most, round(num_patches * (num_crops * mean + CROP_DEVIATIONS * deviation)))


@contextmanager
def _absent_ranks(*, world_size: int, num_replicas: int) -> Iterator[Ranks]:
    """This process as rank 0 among ranks that do not exist; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        device = torch.device("cpu")
        mesh = device_mesh(device, world_size=world_size, num_replicas=num_replicas)
        yield Ranks(rank=0, world_size=world_size, device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()


def _sharded(
    config: TrainingConfig, *, ranks: Ranks, kind: Literal["cuda", "cpu"]
) -> StudentTeacher:
    """Student and teacher, split before they have memory."""
    with torch.device("meta"):
        model = StudentTeacher(config, image_size_pixels=config.crops.global_crop_size_pixels)
    shard_student_teacher(model, ranks=ranks)
    if kind == "cuda":  # as sharding does on a mesh of such devices
        prefetch(list(model.student.backbone.blocks))
        prefetch(list(model.teacher.backbone.blocks))
    return model.train()


def _fill(model: StudentTeacher) -> None:
    """Give parameters and buffers fake memory; drawing weights would read it."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = _fake_shard(parameter) if isinstance(parameter, DTensor) else parameter
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape))


def _fake_shard(parameter: DTensor) -> DTensor:
    local = torch.empty(parameter.to_local().shape)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _batches(
    config: TrainingConfig, *, num_images: int, num_masked: int
) -> tuple[PretrainBatch, ...]:
    """Parts of a rank's batch without pixels."""
    crops, backbone = config.crops, config.backbone
    num_parts = config.optimization.accumulation_steps
    num_images, num_masked = num_images // num_parts, -(-num_masked // num_parts)
    large, small = crops.global_crop_size_pixels, crops.local_crop_size_pixels
    num_patches = (large // backbone.patch_size_pixels) ** 2
    num_local = crops.num_local_crops * num_images
    return tuple(
        PretrainBatch(
            global_crops=torch.empty(2 * num_images, backbone.num_channels, large, large),
            local_crops=torch.empty(num_local, backbone.num_channels, small, small),
            masks=torch.empty(2 * num_images, num_patches, dtype=torch.bool),
            masked_indices=torch.empty(num_masked, dtype=torch.int64),
            mask_weights=torch.empty(num_masked),
            num_masked=num_masked,
        )
        for _ in range(num_parts)
    )
