from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import Head
from dinov2_core.errors import InputError
from dinov2_core.evaluation.teacher import load_teacher
from dinov2_core.models import build_backbone, build_head

BACKBONE = Backbone(
    architecture=Dimensions(embed_dim=16, depth=1, num_heads=2), patch_size_pixels=4
)


def exported(path: Path) -> dict[str, torch.Tensor]:
    backbone = build_backbone(BACKBONE, image_size_pixels=8)
    head = build_head(Head(num_prototypes=6, bottleneck_dim=4, hidden_dim=8), in_dim=16)
    tensors = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    tensors |= {f"dino_head.{k}": v for k, v in head.state_dict().items()}
    save_file(tensors, path)
    return tensors


def test_backbone_and_head_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = exported(tmp_path / "t.safetensors")
    teacher = load_teacher(tmp_path / "t.safetensors", backbone=BACKBONE, image_size_pixels=8)
    for name, value in teacher.backbone.state_dict().items():
        assert torch.equal(value, tensors[f"backbone.{name}"])
    scores = teacher.dino_head(teacher.backbone.features(torch.ones(2, 3, 8, 8)).cls).logits()
    assert scores.shape == (2, 6)
    assert not any(p.requires_grad for p in teacher.backbone.parameters())


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    exported(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="pos_embed"):
        load_teacher(tmp_path / "t.safetensors", backbone=BACKBONE, image_size_pixels=16)


def test_a_file_without_a_head_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = exported(path)
    save_file({k: v for k, v in tensors.items() if k.startswith("backbone.")}, path)
    with pytest.raises(InputError, match="holds no dino_head"):
        load_teacher(path, backbone=BACKBONE, image_size_pixels=8)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a safetensors file"):
        load_teacher(path, backbone=BACKBONE, image_size_pixels=8)
