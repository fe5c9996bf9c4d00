"""An exported teacher, ready to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinov2_core.backbones import BackboneNetwork
from dinov2_core.config.backbone import Backbone
from dinov2_core.errors import InputError
from dinov2_core.heads import DINOHead
from dinov2_core.models import build_backbone
from dinov2_core.weights.loading import load_weights
from dinov2_core.weights.reading import read_state_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Backbone and cls head of an exported teacher, in eval mode without gradients."""

    backbone: BackboneNetwork
    """Images to tokens."""
    dino_head: DINOHead
    """Cls tokens [B, D] to prototype scores [B, K]."""


def load_teacher(path: Path, *, backbone: Backbone, image_size_pixels: int) -> Teacher:
    """Read an exported teacher; every tensor must be there and fit.

    Args:
        path: Safetensors file with `backbone.*` and `dino_head.*`.
        backbone: Architecture it was trained with.
        image_size_pixels: Resolution whose positions it holds.

    Raises:
        InputError: The file is damaged, or a tensor is missing, too much, or has another shape.
    """
    tensors = read_state_dict(path).tensors
    network = build_backbone(backbone, image_size_pixels=image_size_pixels)
    load_weights(network, _below(tensors, "backbone."), source=str(path))
    head_tensors = _below(tensors, "dino_head.")
    head = _head_like(head_tensors, source=str(path))
    load_weights(head, head_tensors, source=str(path))
    return Teacher(
        backbone=network.eval().requires_grad_(False),
        dino_head=head.eval().requires_grad_(False),
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _head_like(tensors: dict[str, Tensor], *, source: str) -> DINOHead:
    """A head with the shapes that stored tensors have."""
    weights = [v for k, v in tensors.items() if k.startswith("mlp.") and k.endswith(".weight")]
    if not weights or "last_layer.weight_v" not in tensors:
        raise InputError(f"{source} holds no dino_head; export the teacher again")
    num_prototypes, bottleneck_dim = tensors["last_layer.weight_v"].shape
    return DINOHead(
        in_dim=weights[0].shape[1],
        hidden_dim=weights[0].shape[0],
        bottleneck_dim=bottleneck_dim,
        num_prototypes=num_prototypes,
        num_layers=len(weights),
    )
