"""training_state: all that a resumed run needs, by reference, under plain names."""

from __future__ import annotations

import torch

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.execution import Checkpoints
from dinov2_core.config.objectives import (
    DinoObjective,
    Head,
    IbotObjective,
    SharedHead,
    SoftmaxCentering,
)
from dinov2_core.config.training import Crops, TrainingConfig
from dinov2_core.training.assembly import adamw
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.training_state import settings_identity, training_state

CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=16, depth=1, num_heads=2), patch_size_pixels=4
    ),
    crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8),
    dino=DinoObjective(head=Head(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)),
    ibot=IbotObjective(head=SharedHead()),
    centering=SoftmaxCentering(),
)


def test_it_holds_both_networks_centres_and_moments() -> None:
    model = build_student_teacher(CONFIG, device=torch.device("cpu"))
    state = training_state(model, optimizer=adamw(model, config=CONFIG))
    names = {name for name, _ in model.student.named_parameters()}
    assert {f"model.student.{name}" for name in names} <= set(state)
    assert {f"model.teacher.{name}" for name in names} <= set(state)
    assert {"model.dino_targets.center", "model.dino_targets.pending"} <= set(state)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert {f"optimizer.{name}.{key}" for name in names} <= set(state)


def test_filling_it_in_place_changes_the_run() -> None:
    model = build_student_teacher(CONFIG, device=torch.device("cpu"))
    optimizer = adamw(model, config=CONFIG)
    for tensor in training_state(model, optimizer=optimizer).values():
        tensor.fill_(3)
    assert all(p.eq(3).all() for p in model.parameters())
    moments = [v for state in optimizer.state.values() for v in state.values()]
    assert all(moment.eq(3).all() for moment in moments)


def test_made_moments_are_those_that_adamw_makes() -> None:
    models = [build_student_teacher(CONFIG, device=torch.device("cpu")) for _ in range(2)]
    optimizers = [adamw(model, config=CONFIG) for model in models]
    optimizers[1].state.clear()
    for model, optimizer in zip(models, optimizers, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for parameter in model.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    states = [training_state(m, optimizer=o) for m, o in zip(models, optimizers, strict=True)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert tensor.dtype == states[1][name].dtype


def test_identity_is_of_what_may_change_the_result() -> None:
    rarer = CONFIG.model_copy(update={"checkpoints": Checkpoints(every_steps=7)})
    assert settings_identity(rarer) == settings_identity(CONFIG)
    assert settings_identity(CONFIG.model_copy(update={"seed": 1})) != settings_identity(CONFIG)
