"""Replay a recording of the reference implementation through this package and compare.

Run as `python -m tests.golden.replay FILE`; prints one JSON object with the largest errors.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_core.config import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.training.parameter_groups import apply_schedule, parameter_groups
from dinov2_core.training.schedules import StepSchedule, schedule_at
from dinov2_core.training.student_teacher import Losses, StudentTeacher

CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+)\.")
CENTERS = {
    "dino_loss.center": "dino_targets.center",
    "ibot_patch_loss.center": "ibot_targets.center",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayErrors:
    """Largest difference from the recording, per quantity."""

    losses: float
    """Relative, over all terms and steps."""
    grad_norms: float
    """Relative, over all submodules and steps."""
    grads: float
    """Norm of the difference over norm, over all recorded tensors."""
    final_elements: float
    """Absolute, over all elements of the last state."""
    final_update: float
    """Norm of the difference over norm of the change since the start, whole state."""


def training_config(recording: dict[str, Any]) -> TrainingConfig:
    """Settings of a recording as this package's settings."""
    cfg, backbone = recording["cfg"], recording["backbone"]
    if not cfg["student"].get("drop_path_uniform", True):
        raise ValueError(
            "student.drop_path_uniform is false, but every block of this package has the same "
            "drop path rate; record with a uniform rate"
        )
    settings = {
        "backbone": {
            "architecture": {
                "embed_dim": backbone["embed_dim"],
                "depth": backbone["depth"],
                "num_heads": backbone["num_heads"],
                "mlp_ratio": backbone["mlp_ratio"],
            },
            "patch_size_pixels": backbone["patch_size"],
            "num_channels": recording["steps"][0]["data"]["collated_global_crops"].shape[1],
            "feed_forward": "swiglu" if backbone["ffn"].startswith("swiglu") else "mlp",
            "num_register_tokens": backbone["num_register_tokens"],
            "layer_scale": backbone["layer_scale"],
            "drop_path_rate": backbone["drop_path_rate"],
            "position_offset": backbone["interpolate_offset"],
            "position_antialias": backbone["interpolate_antialias"],
        },
        "crops": {
            "global_crop_size_pixels": cfg["crops"]["global_crops_size"],
            "local_crop_size_pixels": cfg["crops"]["local_crops_size"],
            "num_local_crops": cfg["crops"]["local_crops_number"],
        },
        **_objective(cfg),
        **_schedules(cfg),
        "precision": "fp32",
    }
    return TrainingConfig.model_validate_json(json.dumps(settings))


def _objective(cfg: dict[str, Any]) -> dict[str, Any]:
    def head(section: dict[str, Any]) -> dict[str, Any]:
        return {
            "num_prototypes": section["head_n_prototypes"],
            "bottleneck_dim": section["head_bottleneck_dim"],
            "hidden_dim": section["head_hidden_dim"],
            "num_layers": section["head_nlayers"],
        }

    dino, ibot = cfg["dino"], cfg["ibot"]
    ibot_head = {"kind": "own", **head(ibot)} if ibot["separate_head"] else {"kind": "shared"}
    is_softmax = cfg["train"]["centering"] == "centering"
    return {
        "dino": {"weight": dino["loss_weight"], "head": head(dino)},
        "ibot": {"weight": ibot["loss_weight"], "head": ibot_head},
        "koleo": {"weight": dino["koleo_loss_weight"], "neighbours": "rank"},
        "centering": {"kind": "softmax" if is_softmax else "sinkhorn_knopp"},
    }


def _schedules(cfg: dict[str, Any]) -> dict[str, Any]:
    optim, teacher, epoch = cfg["optim"], cfg["teacher"], cfg["train"]["OFFICIAL_EPOCH_LENGTH"]
    return {
        "teacher": {
            "momentum": teacher["momentum_teacher"],
            "final_momentum": teacher["final_momentum_teacher"],
            "warmup_temperature": teacher["warmup_teacher_temp"],
            "temperature": teacher["teacher_temp"],
            "temperature_warmup_steps": teacher["warmup_teacher_temp_epochs"] * epoch,
        },
        "optimization": {
            "num_steps": optim["epochs"] * epoch,
            "warmup_steps": optim["warmup_epochs"] * epoch,
            "global_batch_size": 1024,  # the recorded rate is already scaled to the batch
            "base_learning_rate": optim["lr"],
            "final_learning_rate": optim["min_lr"],
            "weight_decay": optim["weight_decay"],
            "final_weight_decay": optim["weight_decay_end"],
            "adam_betas": [optim["adamw_beta1"], optim["adamw_beta2"]],
            "clip_norm": optim["clip_grad"],
            "freeze_prototypes_steps": optim["freeze_last_layer_epochs"] * epoch,
            "layerwise_decay": optim["layerwise_decay"],
            "patch_embed_factor": optim["patch_embed_lr_mult"],
        },
    }


def own_names(state: dict[str, Tensor], *, model: StudentTeacher) -> dict[str, Tensor]:
    """A recorded state under this package's names: flat blocks, vectors as centres."""
    names = {}
    for name, value in state.items():
        if name not in CENTERS:
            names[CHUNKED_BLOCK.sub(r"blocks.\1.", name)] = value
        elif isinstance(model.dino_targets, CenteredTargets):
            names[CENTERS[name]] = value.flatten()
        else:
            assert not value.any(), f"{name} is not zero although nothing updates it"
    return names


def pretrain_batch(data: dict[str, Any]) -> PretrainBatch:
    """A recorded batch as this package's."""
    return PretrainBatch(
        global_crops=data["collated_global_crops"],
        local_crops=data["collated_local_crops"],
        masks=data["collated_masks"],
        masked_indices=data["mask_indices_list"],
        mask_weights=data["masks_weight"],
        num_masked=data["mask_indices_list"].shape[0],
    )


def logged_losses(losses: Losses) -> dict[str, Tensor]:
    """The terms as the reference logs them: it halves two of them."""
    return {
        "dino_local_crops_loss": losses.dino_local,
        "dino_global_crops_loss": losses.dino_global,
        "koleo_loss": losses.koleo / 2,
        "ibot_loss": losses.ibot / 2,
    }


def relative_error(actual: Tensor | float, expected: Tensor | float) -> float:
    """Norm of the difference over norm of the expected value, in float64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = torch.as_tensor(actual, dtype=torch.float64) - expected
    return (difference.norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def schedule_error(recorded: dict[str, float], own: StepSchedule) -> float:
    """Largest absolute difference between a recorded and an own schedule."""
    own_values = asdict(own)
    own_values["last_layer_learning_rate"] = own_values.pop("prototype_learning_rate")
    return max(abs(own_values[name] - value) for name, value in recorded.items())


def replay(recording: dict[str, Any]) -> ReplayErrors:
    """Train from the recorded state on the recorded batches and compare on the way."""
    config = training_config(recording)
    size = config.crops.global_crop_size_pixels
    model = StudentTeacher(config, image_size_pixels=size).train()
    initial = own_names(recording["init"], model=model)
    missing, unexpected = model.load_state_dict(initial, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_targets.pending") for name in missing), missing
    optimizer = torch.optim.AdamW(
        parameter_groups(model.student, optimization=config.optimization),
        betas=config.optimization.adam_betas,
        eps=1e-8,
    )
    losses: list[float] = []
    grad_norms: list[float] = []
    grads: list[float] = []
    for step, recorded in enumerate(recording["steps"]):
        schedule = schedule_at(step, config=config)
        apply_schedule(optimizer, schedule=schedule)
        optimizer.zero_grad()
        torch.manual_seed(recorded["seed"])
        step_losses = model(
            pretrain_batch(recorded["data"]), teacher_temperature=schedule.teacher_temperature
        )
        step_losses.total.backward()
        own_losses = logged_losses(step_losses)
        losses += [relative_error(own_losses[n], x) for n, x in recorded["losses"].items()]
        grads += _gradient_errors(recorded["grads"] or {}, model=model)
        norms = model.clip_gradients(config.optimization.clip_norm)
        grad_norms += [relative_error(norms[n], x) for n, x in recorded["grad_norms"].items()]
        optimizer.step()
        model.update_teacher(schedule.teacher_momentum)
    final = own_names(recording["final"], model=model)
    state = model.state_dict()
    difference = torch.cat([(state[n] - value).flatten().double() for n, value in final.items()])
    change = torch.cat([(value - initial[n]).flatten().double() for n, value in final.items()])
    return ReplayErrors(
        losses=_largest(losses),
        grad_norms=_largest(grad_norms),
        grads=_largest(grads),
        final_elements=difference.abs().max().item(),
        final_update=(difference.norm() / change.norm()).item(),
    )


def _largest(errors: list[float]) -> float:
    """The largest error, not a number if any is; 0 when nothing was recorded."""
    return torch.tensor([0.0, *errors], dtype=torch.float64).max().item()


def _gradient_errors(recorded: dict[str, Tensor], *, model: StudentTeacher) -> list[float]:
    """Relative error of every recorded gradient."""
    parameters = dict(model.student.named_parameters())
    errors = []
    for name, expected in own_names(recorded, model=model).items():
        gradient = parameters[name].grad
        assert gradient is not None, f"{name} has no gradient"
        errors.append(relative_error(gradient, expected))
    return errors


def main(argv: list[str] | None = None) -> int:
    """Replay one file and print the errors."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.replay", description=__doc__)
    parser.add_argument("file", type=Path, help="recording made by the reference")
    path: Path = parser.parse_args(argv).file
    errors = replay(torch.load(path, weights_only=True))
    sys.stdout.write(json.dumps(asdict(errors)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
