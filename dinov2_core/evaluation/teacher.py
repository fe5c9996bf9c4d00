"""An exported teacher, ready to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dinov2_core.backbones import BackboneNetwork
from dinov2_core.config.backbone import Backbone
from dinov2_core.heads import DINOHead
from dinov2_core.models import build_backbone


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
        RuntimeError: A tensor is missing, too much, or has another shape.
    """
    tensors = load_file(path)
    transformer = build_backbone(backbone, image_size_pixels=image_size_pixels)
    transformer.load_state_dict(_below(tensors, "backbone."), strict=True)
    head_tensors = _below(tensors, "dino_head.")
    head = _head_like(head_tensors)
    head.load_state_dict(head_tensors, strict=True)
    return Teacher(
        backbone=transformer.eval().requires_grad_(False),
        dino_head=head.eval().requires_grad_(False),
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _head_like(tensors: dict[str, Tensor]) -> DINOHead:
    """A head with the shapes that stored tensors have."""
    weights = [v for k, v in tensors.items() if k.startswith("mlp.") and k.endswith(".weight")]
    num_prototypes, bottleneck_dim = tensors["last_layer.weight_v"].shape
    return DINOHead(
        in_dim=weights[0].shape[1],
        hidden_dim=weights[0].shape[0],
        bottleneck_dim=bottleneck_dim,
        num_prototypes=num_prototypes,
        num_layers=len(weights),
    )
