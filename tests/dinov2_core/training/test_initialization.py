"""initialization: the seed alone decides the first weights."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective, SharedHead
from dinov2_core.config.training import Crops, TrainingConfig
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.vit.block import LayerScale

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=16, depth=2, num_heads=2),
        patch_size_pixels=4,
        num_register_tokens=2,
        feed_forward="swiglu",
    ),
    crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8),
    dino=DinoObjective(head=Head(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)),
    ibot=IbotObjective(head=SharedHead()),
)


def test_first_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = build_student_teacher(CONFIG, device=CPU).state_dict()
    torch.manual_seed(2)
    same = build_student_teacher(CONFIG, device=CPU).state_dict()
    other = build_student_teacher(CONFIG.model_copy(update={"seed": 1}), device=CPU).state_dict()
    name = "student.backbone.blocks.0.attn.qkv.weight"
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one[name], other[name])


def test_the_teacher_starts_as_the_student() -> None:
    model = build_student_teacher(CONFIG, device=CPU)
    assert model.student.training
    assert not model.teacher.training
    for student, teacher in zip(
        model.student.parameters(), model.teacher.parameters(), strict=True
    ):
        assert torch.equal(student, teacher)
        assert student.requires_grad
        assert not teacher.requires_grad


def test_a_forgotten_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerScale, "init_weights", lambda _self: None)
    with pytest.raises(AssertionError, match=r"student\.backbone\.blocks\.0\.ls1\.gamma"):
        build_student_teacher(CONFIG, device=CPU)
