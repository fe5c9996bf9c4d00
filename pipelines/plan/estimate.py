"""Memory, time and price of the training stages of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from components.train.config import Topology, TrainStage
from dinov2_core.config.training import TrainingConfig
from dinov2_core.planning.step import StepCost
from dinov2_core.training.student_teacher import StudentTeacher
from pipelines.plan.alternatives import Proposal, proposals, stage_of
from pipelines.plan.cost import cost_and_time, peak_gib, trace_in_parallel
from pipelines.plan.hardware import GIB, Hardware, StepTime, step_time
from pipelines.spec.pipeline_spec import PipelineSpec

IMAGE_BYTES = 110_000
"""Size of an encoded image, the mean of ImageNet."""
STATE_BYTES = 16
"""Size of a checkpoint per parameter: student, teacher and both moments, float32."""
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = ("pretrain", "finetune")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """The same global batch on another number of ranks."""

    ranks: int
    images_per_rank: int
    peak_gib: float
    step: StepTime
    efficiency: float
    """Images per second and rank, as a share of the first row's."""
    gpu_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Memory, time and price of one training stage."""

    stage: str
    ranks: int
    images_per_rank: int
    parameters: Mapping[str, int]
    """Parameters of backbone and heads; the teacher has as many again."""
    tokens_per_step: int
    """Tokens of student and teacher over all ranks."""
    cost: StepCost
    """Cost of one rank."""
    step: StepTime
    num_steps: int
    peak_gib: float
    """Memory of one rank, with what is reserved."""
    memory_gib: float
    """Memory of one device."""
    gpu_hours: float
    price: float
    """In the currency of the price per hour."""
    checkpoint_gib: float
    """Size of one checkpoint."""
    kept_gib: float
    """Size of the checkpoints that are kept."""
    read_gib: float
    """Size of the images read over the whole stage."""
    proposals: tuple[Proposal, ...]
    """Changes with which it fits; empty if it fits already, or if none was found."""
    scaling: tuple[ScalingRow, ...]

    @property
    def fits(self) -> bool:
        """Whether a device has enough memory."""
        return self.peak_gib <= self.memory_gib


def plan_stages(
    spec: PipelineSpec, *, hardware: Hardware, price_per_gpu_hour: float = 0.0, scales: bool = True
) -> tuple[StagePlan, ...]:
    """Plan pretraining and the high-resolution stage.

    Args:
        spec: Checked spec.
        hardware: Profile of the devices.
        price_per_gpu_hour: Price of one device, any currency.
        scales: Whether to plan other numbers of ranks too.
    """
    stages = [stage_of(spec, name) for name in STAGES]
    ends = [end for stage in stages for end in _ends(stage).values()] if scales else []
    trace_in_parallel([*stages, *ends], hardware)
    return tuple(
        _plan(name, spec, hardware=hardware, price=price_per_gpu_hour, scales=scales)
        for name in STAGES
    )


def _plan(
    name: str, spec: PipelineSpec, *, hardware: Hardware, price: float, scales: bool
) -> StagePlan:
    stage = stage_of(spec, name)
    learning, topology = stage.learning, stage.topology
    optimization, world = learning.optimization, topology.world_size
    cost, step = cost_and_time(stage, hardware)
    parameters = count_parameters(learning)
    checkpoint = sum(parameters.values()) * STATE_BYTES / GIB
    hours = step.total * optimization.num_steps * world / 3600
    peak = peak_gib(cost, hardware)
    fits = peak <= hardware.memory_gib
    return StagePlan(
        stage=name,
        ranks=world,
        images_per_rank=optimization.global_batch_size // world,
        parameters=parameters,
        tokens_per_step=tokens_per_image(learning) * optimization.global_batch_size,
        cost=cost,
        step=step,
        num_steps=optimization.num_steps,
        peak_gib=peak,
        memory_gib=hardware.memory_gib,
        gpu_hours=hours,
        price=hours * price,
        checkpoint_gib=checkpoint,
        kept_gib=checkpoint * _num_kept(learning),
        read_gib=optimization.num_steps * optimization.global_batch_size * IMAGE_BYTES / GIB,
        proposals=() if fits else proposals(spec, name, hardware),
        scaling=scaling(stage, hardware) if scales else (),
    )


def count_parameters(learning: TrainingConfig) -> dict[str, int]:
    """Parameters of the student's backbone and heads; the teacher has the same."""
    with torch.device("meta"):
        size = learning.crops.global_crop_size_pixels
        student = StudentTeacher(learning, image_size_pixels=size).student
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in student.named_children()
    }


def tokens_per_image(learning: TrainingConfig) -> int:
    """Tokens of an image's crops: the student has all of them, the teacher two."""
    crops, num_tokens = learning.crops, learning.backbone.num_tokens
    large = num_tokens(crops.global_crop_size_pixels)
    return 4 * large + crops.num_local_crops * num_tokens(crops.local_crop_size_pixels)


def scaling(stage: TrainStage, hardware: Hardware) -> tuple[ScalingRow, ...]:
    """The same global batch on 8 to 1,024 ranks, those that it divides into.

    Two steps are traced, with the fewest and the most images per rank. Between them work and
    temporary memory are linear in the images of a rank, parameters and their moments in the share
    of a rank; a replica keeps its number of ranks.
    """
    ranks = [world for world in RANKS if _fits_batch(stage, world)]
    ends = {world: cost_and_time(end, hardware)[0] for world, end in _ends(stage).items()}
    rows: list[ScalingRow] = []
    for world in ranks:
        cost = _between(ends, world=world)
        step = step_time(
            cost, hardware, world_size=world, num_replicas=_on(stage, world).topology.num_replicas
        )
        first = rows[0] if rows else None
        ideal = first.step.total * first.ranks / world if first else step.total
        rows.append(
            ScalingRow(
                ranks=world,
                images_per_rank=stage.learning.optimization.global_batch_size // world,
                peak_gib=peak_gib(cost, hardware),
                step=step,
                efficiency=ideal / step.total,
                gpu_hours=step.total * stage.learning.optimization.num_steps * world / 3600,
            )
        )
    return tuple(rows)


def _ends(stage: TrainStage) -> dict[int, TrainStage]:
    """The stage on the fewest and the most ranks that its batch divides into."""
    ranks = [world for world in RANKS if _fits_batch(stage, world)]
    return {world: _on(stage, world) for world in (*ranks[:1], *ranks[-1:])}


def _between(ends: Mapping[int, StepCost], *, world: int) -> StepCost:
    """Cost at a number of ranks, interpolated between the fewest and the most."""
    few, many = min(ends), max(ends)
    low, high = ends[few], ends[many]
    if few == many:
        return low
    weight = (1 / world - 1 / many) / (1 / few - 1 / many)

    def mix(more: float, less: float) -> int:
        return round(weight * more + (1 - weight) * less)

    def mixed(more: Mapping[str, int], less: Mapping[str, int]) -> dict[str, int]:
        return {key: mix(more.get(key, 0), less.get(key, 0)) for key in {*more, *less}}

    return StepCost(
        peak_bytes=mix(low.peak_bytes, high.peak_bytes),
        memory_bytes=mixed(low.memory_bytes, high.memory_bytes),
        flops=mixed(low.flops, high.flops),
        moved_bytes=mix(low.moved_bytes, high.moved_bytes),
        sent_bytes=mixed(low.sent_bytes, high.sent_bytes),
        calls=high.calls,
    )


def _fits_batch(stage: TrainStage, world: int) -> bool:
    optimization = stage.learning.optimization
    return optimization.global_batch_size % (world * optimization.accumulation_steps) == 0


def _on(stage: TrainStage, world: int) -> TrainStage:
    """The stage on another number of ranks; a replica keeps its ranks if there are enough."""
    old = stage.topology
    shards = old.world_size // old.num_replicas
    replicas = max(1, world // shards) if old.num_replicas > 1 else 1
    topology = Topology(processes_per_node=1, num_nodes=world, num_replicas=replicas)
    return stage.model_copy(update={"topology": topology})


def _num_kept(learning: TrainingConfig) -> int:
    checkpoints, steps = learning.checkpoints, learning.optimization.num_steps
    permanent = steps // checkpoints.keep_every_steps if checkpoints.keep_every_steps else 0
    return min(checkpoints.keep_last + permanent, -(-steps // checkpoints.every_steps))
