"""update: the device's decision gives the host's weights bit for bit, taken or skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective, SoftmaxCentering
from dinov2_core.config.training import Crops, TrainingConfig
from dinov2_core.training.assembly import adamw
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.training_state import training_state
from dinov2_core.training.update import update_or_skip

HEAD = Head(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=16, depth=1, num_heads=2), patch_size_pixels=4
    ),
    crops=Crops(global_crop_size_pixels=8, local_crop_size_pixels=4),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    centering=SoftmaxCentering(),
)
SCHEDULE = StepSchedule(
    learning_rate=0.01,
    prototype_learning_rate=0.01,
    weight_decay=0.04,
    teacher_momentum=0.9912345,
    teacher_temperature=0.05,
)


def states_after_two_updates(
    *, skips_second: bool, on_device: bool, bad_weight: float = 0.0, is_frozen: bool = False
) -> list[dict[str, Tensor]]:
    """States before and after the second of two updates."""
    model = build_student_teacher(CONFIG, device=torch.device("cpu"))
    optimizer = adamw(model, config=CONFIG)
    generator = torch.Generator().manual_seed(1)
    schedule = copy.copy(SCHEDULE)
    object.__setattr__(schedule, "is_backbone_frozen", is_frozen)
    states = []
    for is_skipped in (False, skips_second):
        centres = [buffer.clone() for buffer in model.buffers()]
        for buffer in model.buffers():
            buffer.add_(1.0)
        for parameter in model.student.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.fill_(torch.nan) if is_skipped else gradient
        if is_skipped and bad_weight:
            model.student.backbone.norm.weight.detach().fill_(bad_weight)
        update_or_skip(
            model,
            optimizer,
            schedule=schedule,
            centres=centres,
            is_skipped=torch.tensor(is_skipped) if on_device else is_skipped,
        )
        state = training_state(model, optimizer=optimizer)
        states.append({name: value.detach().clone() for name, value in state.items()})
    return states


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_device_and_host_agree_bit_for_bit(skips: bool, is_frozen: bool) -> None:
    host, device = (
        states_after_two_updates(skips_second=skips, on_device=on_device, is_frozen=is_frozen)
        for on_device in (False, True)
    )
    for one, other in zip(host, device, strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    moved = [name for name, value in host[0].items() if not torch.equal(value, host[1][name])]
    assert bool(moved) is not skips


@pytest.mark.parametrize("bad_weight", [float("nan"), float("inf")])
def test_a_student_that_is_not_finite_does_not_reach_the_teacher(bad_weight: float) -> None:
    for on_device in (False, True):
        before, after = states_after_two_updates(
            skips_second=True, on_device=on_device, bad_weight=bad_weight
        )
        for name, value in before.items():
            if name != "model.student.backbone.norm.weight":
                assert torch.equal(value, after[name]), name
