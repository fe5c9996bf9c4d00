"""The tensors of a run by name: everything that a resumed run continues from."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from torch.optim import AdamW

from dinov2_core.config.training import TrainingConfig
from dinov2_core.training.student_teacher import StudentTeacher

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_moments(optimizer: AdamW) -> None:
    """Give every parameter the state that AdamW would make at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }


def training_state(model: StudentTeacher, *, optimizer: AdamW) -> dict[str, Tensor]:
    """Student, teacher, centres, moments and step counts; filling them in place is resuming.

    Random state is not among them: it is a function of the step, see `seed_step`.
    """
    state: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
    for name, parameter in model.student.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def settings_identity(config: TrainingConfig) -> str:
    """Hex sha256 of the settings that a checkpoint belongs to.

    Not among them: how often checkpoints are written, how memory is saved, and guards, so that a
    run that any of them stopped continues under others.
    """
    settings = config.model_dump(mode="json", exclude={"checkpoints", "execution", "guards"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
