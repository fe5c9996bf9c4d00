"""Parameter groups: layer-wise decay, weight-decay exemptions, frozen prototypes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dinov2_core.config.training import Optimization
from dinov2_core.training.schedules import StepSchedule

INPUT_PARAMETERS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed.")
BLOCK_NAME = re.compile(r"backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Multipliers:
    """What sets a parameter group apart."""

    learning_rate: float
    """Factor on the scheduled learning rate."""
    weight_decay: float
    """Factor on the scheduled weight decay, 0 or 1."""
    is_prototype: bool
    """Follows the prototypes' learning rate, which is 0 while they are frozen."""
    is_backbone: bool
    """Does not move while only heads learn."""


def multipliers(name: str, *, depth: int, optimization: Optimization) -> Multipliers:
    """Multipliers of one parameter of the student, as in the recipe of arXiv:2304.07193.

    The learning rate falls by layerwise_decay per block from the top down: blocks count 1 to
    depth, everything before them 0, the final norm and the heads depth + 1. Biases, norms and
    LayerScale do not decay; tokens, positions and prototypes do.

    Args:
        name: Starts with backbone or the name of a head.
        depth: Blocks of the backbone.
        optimization: Decay settings.

    Returns:
        The parameter's multipliers.
    """
    layer = depth + 1
    if block := BLOCK_NAME.match(name):
        layer = int(block.group(1)) + 1
    elif name.startswith(tuple(f"backbone.{part}" for part in INPUT_PARAMETERS)):
        layer = 0
    learning_rate = optimization.layerwise_decay ** (depth + 1 - layer)
    if name.startswith("backbone.patch_embed."):
        learning_rate *= optimization.patch_embed_factor
    is_exempt = name.endswith(".bias") or "norm" in name or "gamma" in name
    return Multipliers(
        learning_rate=learning_rate,
        weight_decay=0.0 if is_exempt else 1.0,
        is_prototype="last_layer." in name,
        is_backbone=name.startswith("backbone."),
    )


def parameter_groups(student: nn.Module, *, optimization: Optimization) -> list[dict[str, Any]]:
    """Group the student's trainable parameters by their multipliers.

    Args:
        student: Module with backbone and heads as children, sharded or not.
        optimization: Decay settings.

    Returns:
        Groups for a torch optimizer in a fixed order, with the keys of `Multipliers` prefixed as
        learning_rate_multiplier, weight_decay_multiplier, is_prototype and is_backbone. lr and
        weight_decay are 0 until `apply_schedule`.
    """
    parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    blocks = [int(match.group(1)) for name in parameters if (match := BLOCK_NAME.match(name))]
    depth = max(blocks, default=-1) + 1
    members: dict[Multipliers, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        group = multipliers(name, depth=depth, optimization=optimization)
        members.setdefault(group, []).append(parameter)
    return [
        {
            "params": members[group],
            "lr": 0.0,
            "weight_decay": 0.0,
            "learning_rate_multiplier": group.learning_rate,
            "weight_decay_multiplier": group.weight_decay,
            "is_prototype": group.is_prototype,
            "is_backbone": group.is_backbone,
        }
        for group in sorted(members)
    ]


def apply_schedule(optimizer: Optimizer, *, schedule: StepSchedule) -> None:
    """Set learning rate and weight decay of every group for the coming step.

    A frozen backbone has 0 for both: AdamW then adds nothing to it but updates its moments,
    so that its first real step is scaled by gradients seen, as that of frozen prototypes is.
    """
    for group in optimizer.param_groups:
        rate = schedule.prototype_learning_rate if group["is_prototype"] else schedule.learning_rate
        moves = 0.0 if group["is_backbone"] and schedule.is_backbone_frozen else 1.0
        group["lr"] = moves * rate * group["learning_rate_multiplier"]
        group["weight_decay"] = moves * schedule.weight_decay * group["weight_decay_multiplier"]
