"""What the settings say of execution arrives in the modules."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dinov2_core.config.training import TrainingConfig
from dinov2_core.distributed.mesh import process_group
from dinov2_core.errors import SettingsError
from dinov2_core.training import assembly
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.vit.attention import Attention
from dinov2_core.vit.attention_kernels import KERNELS

HEAD = {"num_prototypes": 16, "bottleneck_dim": 8, "hidden_dim": 16}


def assembled(**execution: Any) -> StudentTeacher:
    settings = {
        "backbone": {
            "architecture": {"embed_dim": 16, "depth": 2, "num_heads": 2},
            "patch_size_pixels": 4,
        },
        "crops": {"global_crop_size_pixels": 8, "local_crop_size_pixels": 4},
        "dino": {"head": HEAD},
        "ibot": {"head": {"kind": "own", **HEAD}},
        "precision": "fp32",
        "execution": execution,
    }
    config = TrainingConfig.model_validate_json(json.dumps(settings))
    model = build_student_teacher(config, device=torch.device("cpu"))
    with process_group() as ranks:
        shard_student_teacher(model, ranks=ranks)
    return model


def kernels(model: StudentTeacher) -> list[str]:
    names = {function: name for name, function in KERNELS.items()}
    return [names[module.attend] for module in model.modules() if isinstance(module, Attention)]


def test_the_chosen_kernel_reaches_every_block_of_student_and_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert kernels(assembled()) == ["per_group"] * 4
    monkeypatch.setattr(assembly, "choose_kernel", lambda named, device, dtype: "flex")
    assert kernels(assembled()) == ["flex"] * 4


def test_a_kernel_that_cannot_run_is_refused_before_any_step() -> None:
    with pytest.raises(SettingsError, match="attention_kernel varlen"):
        assembled(attention_kernel="varlen")


def test_adamw_holds_every_trained_parameter_once() -> None:
    model = assembled()
    optimizer = adamw(model, config=model.config)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.student.parameters())
