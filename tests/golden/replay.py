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

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.objective import Losses
from dinov2_core.training.parameter_groups import apply_schedule, parameter_groups
from dinov2_core.training.schedules import StepSchedule, schedule_at
from dinov2_core.training.student_teacher import StudentTeacher

CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+)\.")
LONE_LAYER = re.compile(r"(_head\.mlp)\.(weight|bias)$")
CENTERS = {
    "dino_loss.center": "dino_targets.center",
    "ibot_patch_loss.center": "ibot_targets.center",
}
CENTERINGS = {"centering": "softmax", "sinkhorn_knopp": "sinkhorn_knopp"}
FEED_FORWARDS = {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}
OPTIONAL_PARAMETERS = {
    "qkv_bias": (".attn.qkv.bias",),
    "proj_bias": (".attn.proj.bias",),
    "ffn_bias": (".mlp.fc1.bias", ".mlp.fc2.bias", ".mlp.w12.bias", ".mlp.w3.bias"),
    "layerscale": (".ls1.gamma", ".ls2.gamma"),
}
"""Endings of the parameters that blocks of the reference lack where a student setting is false."""


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
            "feed_forward": _own_name(cfg, "student.ffn_layer", choices=FEED_FORWARDS),
            "num_register_tokens": backbone["num_register_tokens"],
            "layer_scale": backbone["layer_scale"] or 1.0,
            "drop_path_rate": backbone["drop_path_rate"],
            "position_offset": backbone["interpolate_offset"] or 0.0,
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
            "num_layers": max(section["head_nlayers"], 1),
        }

    dino, ibot = cfg["dino"], cfg["ibot"]
    has_own_head = ibot["separate_head"] and ibot["loss_weight"]
    ibot_head = {"kind": "own", **head(ibot)} if has_own_head else {"kind": "shared"}
    return {
        "dino": {"weight": dino["loss_weight"], "head": head(dino)},
        "ibot": {"weight": ibot["loss_weight"], "head": ibot_head},
        "koleo": {"weight": dino["koleo_loss_weight"], "neighbours": "rank"},
        "centering": {"kind": _own_name(cfg, "train.centering", choices=CENTERINGS)},
    }


def _own_name(cfg: dict[str, Any], setting: str, *, choices: dict[str, str]) -> str:
    """This package's name for the recorded value of a setting."""
    section, key = setting.split(".")
    value = cfg[section][key]
    if value not in choices:
        raise ValueError(
            f"{setting} {value!r} is not in this package; record with one of {', '.join(choices)}"
        )
    return choices[value]


def _schedules(cfg: dict[str, Any]) -> dict[str, Any]:
    optim, teacher, epoch = cfg["optim"], cfg["teacher"], cfg["train"]["OFFICIAL_EPOCH_LENGTH"]

    def steps(section: str, key: str) -> int:
        num_steps = cfg[section][key] * epoch
        if num_steps != int(num_steps):
            raise ValueError(
                f"{section}.{key} {cfg[section][key]} is {num_steps} steps of "
                f"train.OFFICIAL_EPOCH_LENGTH {epoch}; record with a whole number of steps"
            )
        return int(num_steps)

    return {
        "teacher": {
            "momentum": teacher["momentum_teacher"],
            "final_momentum": teacher["final_momentum_teacher"],
            "warmup_temperature": teacher["warmup_teacher_temp"],
            "temperature": teacher["teacher_temp"],
            "temperature_warmup_steps": steps("teacher", "warmup_teacher_temp_epochs"),
        },
        "optimization": {
            "num_steps": steps("optim", "epochs"),
            "warmup_steps": steps("optim", "warmup_epochs"),
            "global_batch_size": 1024,  # the recorded rate is already scaled to the batch
            "base_learning_rate": optim["lr"],
            "final_learning_rate": optim["min_lr"],
            "weight_decay": optim["weight_decay"],
            "final_weight_decay": optim["weight_decay_end"],
            "adam_betas": [optim["adamw_beta1"], optim["adamw_beta2"]],
            "clip_norm": optim["clip_grad"] or torch.finfo(torch.float32).max,
            "freeze_prototypes_steps": steps("optim", "freeze_last_layer_epochs"),
            "layerwise_decay": optim["layerwise_decay"],
            "patch_embed_factor": optim["patch_embed_lr_mult"] or sys.float_info.min,
        },
    }


def own_names(state: dict[str, Tensor], *, model: StudentTeacher) -> dict[str, Tensor]:
    """A recorded state under this package's names: flat blocks and heads, vectors as centres."""
    names = {}
    for name, value in state.items():
        if name not in CENTERS:
            flat = CHUNKED_BLOCK.sub(r"blocks.\1.", name)
            names[LONE_LAYER.sub(r"\1.0.\2", flat)] = value
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


def logged_losses(losses: Losses, *, config: TrainingConfig) -> dict[str, Tensor]:
    """The terms as the reference logs them: koleo alone with its weight, two of them halved."""
    dino_weight, ibot_weight = config.dino.weight or 1.0, config.ibot.weight or 1.0
    return {
        "dino_local_crops_loss": losses.terms["dino_local"] / dino_weight,
        "dino_global_crops_loss": losses.terms["dino_global"] / dino_weight,
        "ibot_loss": losses.terms["ibot"] / ibot_weight / 2,
        "koleo_loss": losses.terms["koleo"] / 2,
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


def load(initial: dict[str, Tensor], *, model: StudentTeacher, cfg: dict[str, Any]) -> None:
    """Start a model from a recorded state under its own names.

    Parameters that cfg leaves out become the identity and do not learn. No batch waits for the
    centres, so that they stay as they are in the first step.

    Raises:
        ValueError: The state is not that of the model.
    """
    missing, unexpected = model.load_state_dict(initial, strict=False)
    left_out = tuple(
        ending
        for setting, endings in OPTIONAL_PARAMETERS.items()
        if not cfg["student"].get(setting, True)
        for ending in endings
    )
    parameters = [name for name in missing if ".blocks." in name and name.endswith(left_out)]
    centers = ["dino_targets.pending", "ibot_targets.pending"]
    if not cfg["ibot"]["loss_weight"]:
        centers.append("ibot_targets.center")
    lacking = sorted(set(missing) - set(parameters) - set(centers))
    if lacking or unexpected:
        raise ValueError(
            f"init lacks {lacking} and has {sorted(unexpected)} beyond the model that cfg and "
            "backbone describe; record the whole state and the settings that it belongs to"
        )
    for name in parameters:
        parameter = model.get_parameter(name).requires_grad_(False)
        torch.nn.init.constant_(parameter, 1.0 if name.endswith(".gamma") else 0.0)
    for targets in (model.dino_targets, model.ibot_targets):
        if isinstance(targets, CenteredTargets):
            targets.pending.copy_(targets.center)


def set_drop_path_rates(model: StudentTeacher, *, cfg: dict[str, Any]) -> None:
    """Without a uniform rate, the reference's grows from 0 in the first block to the last."""
    if cfg["student"].get("drop_path_uniform", True) is True:
        return
    blocks = model.student.backbone.blocks
    rates = torch.linspace(0, model.config.backbone.drop_path_rate, len(blocks)).tolist()
    for block, rate in zip(blocks, rates, strict=True):
        block.drop_path_rate = rate


def replay(recording: dict[str, Any]) -> ReplayErrors:
    """Train from the recorded state on the recorded batches and compare on the way."""
    config = training_config(recording)
    size = config.crops.global_crop_size_pixels
    model = StudentTeacher(config, image_size_pixels=size).train()
    initial = own_names(recording["init"], model=model)
    load(initial, model=model, cfg=recording["cfg"])
    set_drop_path_rates(model, cfg=recording["cfg"])
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
        step_losses = accumulate_gradients(
            model,
            [pretrain_batch(recorded["data"])],
            teacher_temperature=schedule.teacher_temperature,
        )
        own_losses = logged_losses(step_losses, config=config)
        losses += [relative_error(own_losses[n], x) for n, x in recorded["losses"].items()]
        grads += _gradient_errors(recorded["grads"] or {}, model=model)
        norms = model.clip_gradients(config.optimization.clip_norm)
        grad_norms += [
            relative_error(norms[n], x) for n, x in (recorded["grad_norms"] or {}).items()
        ]
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
