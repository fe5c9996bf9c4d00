from __future__ import annotations

import pytest
import torch
from torch import nn

from components.train.config import TrainStage
from dinov2_core.planning.step import masked_patches, trace_step
from dinov2_core.training.student_teacher import StudentTeacher
from pipelines.plan.cost import cost_and_time
from pipelines.plan.estimate import (
    StagePlan,
    count_parameters,
    plan_stages,
    scaling,
    tokens_per_image,
)
from pipelines.plan.hardware import GIB, load_hardware
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.pipelines.specs import REPOSITORY, small_values, write_spec

H100 = load_hardware("h100")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PipelineSpec:
    values = small_values("s3://bucket/pile")
    values["pretrain"]["learning"]["optimization"]["global_batch_size"] = 64
    values["pretrain"]["learning"]["optimization"]["num_steps"] = 100
    return load_spec(write_spec(values, tmp_path_factory.mktemp("spec") / "spec.yaml"))


@pytest.fixture(scope="module")
def plans(spec: PipelineSpec) -> tuple[StagePlan, ...]:
    return plan_stages(spec, hardware=H100, price_per_gpu_hour=2.0, scales=False)


def test_both_training_stages_are_planned(plans: tuple[StagePlan, ...]) -> None:
    pretrain, finetune = plans
    assert (pretrain.stage, finetune.stage) == ("pretrain", "finetune")
    assert (pretrain.num_steps, finetune.num_steps) == (100, 4)
    assert pretrain.fits
    assert pretrain.proposals == ()
    assert pretrain.price == pytest.approx(2 * pretrain.gpu_hours)
    assert pretrain.gpu_hours == pytest.approx(100 * pretrain.step.total / 3600)


def test_published_sizes_are_counted() -> None:
    """DINOv2's ViT-L/14 has 300 M parameters and its g/14 1,100 M (arXiv:2304.07193, table 1)."""
    for name, millions in (("vitl14", 300), ("vitg14", 1100)):
        spec = load_spec(REPOSITORY / "pipelines" / "specs" / f"{name}.yaml")
        counted = count_parameters(spec.pretrain.learning)["backbone"]
        assert counted / 1e6 == pytest.approx(millions, rel=0.04)


def test_tokens_are_those_of_all_crops(spec: PipelineSpec) -> None:
    """Two global crops of 16 patches twice, four local ones of 4, each with a cls token."""
    assert tokens_per_image(spec.pretrain.learning) == 4 * 17 + 4 * 5


def test_what_does_not_fit_comes_with_changes_that_do(spec: PipelineSpec) -> None:
    roomy = plan_stages(spec, hardware=H100, scales=False)[0]
    memory = 0.6 * roomy.cost.peak_bytes / GIB
    small = H100.model_copy(update={"reserved_gib": 0.0, "memory_gib": memory})
    plan = plan_stages(spec, hardware=small, scales=False)[0]
    assert not plan.fits
    assert plan.proposals


def test_a_scaling_row_is_near_to_its_own_trace(spec: PipelineSpec) -> None:
    rows = scaling(spec.pretrain_stage, H100)
    assert [row.ranks for row in rows] == [8, 16, 32, 64]
    assert rows[0].efficiency == 1
    middle = next(row for row in rows if row.ranks == 16)
    traced = trace_step(spec.pretrain.learning, world_size=16)
    assert middle.peak_gib - H100.reserved_gib == pytest.approx(traced.peak_bytes / GIB, rel=0.1)
    assert rows[-1].efficiency < middle.efficiency


def test_checkpoints_hold_four_numbers_per_parameter(
    spec: PipelineSpec, plans: tuple[StagePlan, ...]
) -> None:
    count = sum(count_parameters(spec.pretrain.learning).values())
    assert plans[0].checkpoint_gib == pytest.approx(4 * 4 * count / GIB)
    assert plans[0].kept_gib == pytest.approx(2 * plans[0].checkpoint_gib)


def flops_by_hand(stage: TrainStage) -> float:
    """Operations of a rank: 6 per weight and token of the student, 2 of the teacher's, attention.

    Efficient stochastic depth leaves crops of a group out, so that their tokens do not count.
    """
    learning, world = stage.learning, stage.topology.world_size
    with torch.device("meta"):
        student = StudentTeacher(learning, image_size_pixels=224).student

    def weights(part: nn.Module) -> int:
        return sum(weight.numel() for weight in part.parameters() if weight.dim() == 2)

    backbone, keeps = student.backbone, 1 - learning.backbone.drop_path_rate
    width, depth = backbone.norm.weight.shape[0], len(backbone.blocks)
    images = learning.optimization.global_batch_size // world
    total = 0.0
    for crops, patches, sees_teacher in ((2 * images, 256, True), (8 * images, 49, False)):
        kept, tokens = int(crops * keeps), patches + 1
        attention = 4 * depth * width * tokens**2
        total += 6 * weights(backbone.blocks) * kept * tokens + 3.5 * attention * kept
        pixels = 2 * 3 * 14**2 * width * patches * crops
        total += 2 * pixels
        if sees_teacher:
            total += 2 * weights(backbone.blocks) * crops * tokens + attention * crops + pixels
    masked = masked_patches(learning, world_size=world)
    for head, rows, teacher_rows in (
        (student.dino_head, 10 * images, 2 * images),
        (student.ibot_head, masked, masked),
    ):
        total += (6 * rows + 2 * teacher_rows) * (weights(head) - weights(head.last_layer))
        # Of prototypes: the student's scores forward, again backward and for two gradients; the
        # teacher's for three iterations, then targets, scores and their mean, forward and backward.
        products = 4 * rows + (3 + 4) * teacher_rows
        total += 2 * products * head.last_layer.weight_v.numel()
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published_hours"), [("vitl14", 7600), ("vitg14", 22000)])
def test_flops_are_those_counted_by_hand_and_hours_those_published(
    name: str, published_hours: int
) -> None:
    """The profile's shares are calibrated with both runs; one pair of them has to do for both."""
    spec = load_spec(REPOSITORY / "pipelines" / "specs" / f"{name}.yaml")
    stage = spec.pretrain_stage
    cost, step = cost_and_time(stage, load_hardware("a100-80"))
    assert sum(cost.flops.values()) == pytest.approx(flops_by_hand(stage), rel=0.002)
    hours = step.total * stage.learning.optimization.num_steps * stage.topology.world_size / 3600
    assert hours == pytest.approx(published_hours, rel=0.05)
