"""initialization: the seed alone decides the first weights, or a given teacher does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov2_core.config import (
    Backbone,
    Crops,
    Dimensions,
    DinoObjective,
    Head,
    IbotObjective,
    SharedHead,
    TrainingConfig,
)
from dinov2_core.distributed.export import export_weights
from dinov2_core.training.initialization import build_student_teacher, resample_to_side

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


def test_starting_weights_replace_both(tmp_path: Path) -> None:
    given = build_student_teacher(CONFIG.model_copy(update={"seed": 5}), device=CPU)
    path = tmp_path / "teacher.safetensors"
    export_weights(given.teacher, path=path)
    model = build_student_teacher(CONFIG, device=CPU, starting_weights=path)
    for part in (model.student, model.teacher):
        for one, other in zip(part.parameters(), given.teacher.parameters(), strict=True):
            assert torch.equal(one, other)


def test_resampling_keeps_a_ramp_and_the_cls_position() -> None:
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    positions = torch.cat([torch.tensor([[[9.0]]]), ramp], dim=1)
    resampled = resample_to_side(positions, 8)
    assert resampled.shape == (1, 65, 1)
    assert resampled[0, 0, 0] == 9
    rows = resampled[0, 1:, 0].view(8, 8)
    assert torch.allclose(rows, rows[:, :1].expand(8, 8), atol=1e-6)
    assert (rows[1:, 0] > rows[:-1, 0]).all()
    assert rows.mean() == pytest.approx(1.5, abs=1e-5)
