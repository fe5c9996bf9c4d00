import dataclasses
import functools

import pytest
import torch
from torch import nn

from dinov2_core.config.training import Optimization
from dinov2_core.heads import DINOHead
from dinov2_core.training.parameter_groups import (
    Multipliers,
    apply_schedule,
    multipliers,
    parameter_groups,
)
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.vit.transformer import VisionTransformer

SCHEDULE = StepSchedule(
    learning_rate=2.0,
    prototype_learning_rate=0.0,
    weight_decay=0.5,
    teacher_momentum=0.9,
    teacher_temperature=0.04,
)


def make_student(*, depth: int = 12) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "backbone": VisionTransformer(
                image_size_pixels=8,
                patch_size_pixels=4,
                embed_dim=16,
                depth=depth,
                num_heads=2,
                num_register_tokens=2,
            ),
            "dino_head": DINOHead(in_dim=16, hidden_dim=8, bottleneck_dim=4, num_prototypes=6),
        }
    )


# Values of the reference for ViT-S with layer-wise decay 0.9: 12 blocks count 1 to 12.
@pytest.mark.parametrize(
    ("name", "learning_rate", "weight_decay", "is_prototype"),
    [
        ("backbone.cls_token", 0.9**13, 1.0, False),
        ("backbone.pos_embed", 0.9**13, 1.0, False),
        ("backbone.mask_token", 0.9**13, 1.0, False),
        ("backbone.register_tokens", 0.9**13, 1.0, False),
        ("backbone.patch_embed.proj.weight", 0.2 * 0.9**13, 1.0, False),
        ("backbone.patch_embed.proj.bias", 0.2 * 0.9**13, 0.0, False),
        ("backbone.blocks.0.attn.qkv.weight", 0.9**12, 1.0, False),
        ("backbone.blocks.0.attn.qkv.bias", 0.9**12, 0.0, False),
        ("backbone.blocks.11.mlp.fc1.weight", 0.9, 1.0, False),
        ("backbone.blocks.11.norm1.weight", 0.9, 0.0, False),
        ("backbone.blocks.11.ls1.gamma", 0.9, 0.0, False),
        ("backbone.norm.weight", 1.0, 0.0, False),
        ("backbone.norm.bias", 1.0, 0.0, False),
        ("dino_head.mlp.0.weight", 1.0, 1.0, False),
        ("dino_head.mlp.0.bias", 1.0, 0.0, False),
        ("dino_head.last_layer.weight_g", 1.0, 1.0, True),
        ("ibot_head.last_layer.weight_v", 1.0, 1.0, True),
    ],
)
def test_multipliers_are_the_references(
    name: str, learning_rate: float, weight_decay: float, is_prototype: bool
) -> None:
    actual = multipliers(name, depth=12, optimization=Optimization())
    assert actual.learning_rate == pytest.approx(learning_rate, rel=1e-12)
    assert actual.weight_decay == weight_decay
    assert actual.is_prototype == is_prototype


def test_every_parameter_is_in_one_group_with_its_multipliers() -> None:
    student = make_student()
    groups = parameter_groups(student, optimization=Optimization())
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert multipliers(name, depth=12, optimization=Optimization()) == Multipliers(
                learning_rate=group["learning_rate_multiplier"],
                weight_decay=group["weight_decay_multiplier"],
                is_prototype=group["is_prototype"],
                is_backbone=group["is_backbone"],
            )
    assert sorted(seen) == sorted(names.values())


def test_groups_are_fused_to_as_few_as_the_references() -> None:
    student = make_student()
    del student["dino_head"]
    # Tokens, patch weight, patch bias, weights and the rest of 12 blocks, final norm.
    assert len(parameter_groups(student, optimization=Optimization())) == 28


def test_frozen_parameters_have_no_group() -> None:
    student = make_student(depth=1)
    student["backbone"].requires_grad_(False)
    groups = parameter_groups(student, optimization=Optimization())
    num_grouped = functools.reduce(lambda total, group: total + len(group["params"]), groups, 0)
    assert num_grouped == len(list(student["dino_head"].parameters()))


def test_schedule_is_multiplied_into_every_group() -> None:
    student = make_student(depth=1)
    optimizer = torch.optim.AdamW(parameter_groups(student, optimization=Optimization()))
    for _ in range(2):  # applying is not cumulative
        apply_schedule(optimizer, schedule=SCHEDULE)
    for group in optimizer.param_groups:
        rate = 0.0 if group["is_prototype"] else 2.0
        assert group["lr"] == rate * group["learning_rate_multiplier"]
        assert group["weight_decay"] == 0.5 * group["weight_decay_multiplier"]


def test_a_frozen_backbone_has_neither_rate_nor_decay() -> None:
    optimizer = torch.optim.AdamW(
        parameter_groups(make_student(depth=1), optimization=Optimization())
    )
    frozen = dataclasses.replace(SCHEDULE, prototype_learning_rate=2.0, is_backbone_frozen=True)
    apply_schedule(optimizer, schedule=frozen)
    for group in optimizer.param_groups:
        moves = 0.0 if group["is_backbone"] else 1.0
        assert group["lr"] == moves * 2.0 * group["learning_rate_multiplier"]
        assert group["weight_decay"] == moves * 0.5 * group["weight_decay_multiplier"]
    assert {group["is_backbone"] for group in optimizer.param_groups} == {False, True}
