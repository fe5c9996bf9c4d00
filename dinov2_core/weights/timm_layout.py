"""timm's vision transformers, as far as DINOv2 uses them: names, conventions and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_core.config.backbone import ARCHITECTURES, Backbone, TeacherConfig

FC1_WEIGHT = re.compile(r"(blocks\.\d+\.mlp\.)fc1\.weight$")
TIMM_SIZES = {
    "vit_small": "vit_small",
    "vit_base": "vit_base",
    "vit_large": "vit_large",
    "vit_giant2": "vit_giant",
}


def is_timm(weights: Mapping[str, Tensor]) -> bool:
    """Whether a bare backbone is timm's, which has almost the reference's names."""
    return "pos_embed" in weights and "mask_token" not in weights


def from_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the reference's names.

    timm has no mask token. With registers its positions leave out the cls token's, which is
    already added to the cls token: it becomes 0 here. A packed SwiGLU is named like an MLP and
    recognised by fc1 being twice as wide as fc2.
    """
    named = dict(weights)
    if "reg_token" in named:
        named["register_tokens"] = named.pop("reg_token")
        positions = named.get("pos_embed")
        if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
            named["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    for name in list(named):
        if found := FC1_WEIGHT.match(name):
            mlp = found[1]
            second = named.get(f"{mlp}fc2.weight")
            if second is not None and named[name].shape[0] == 2 * second.shape[1]:
                _rename(named, f"{mlp}fc1.", f"{mlp}w12.")
                _rename(named, f"{mlp}fc2.", f"{mlp}w3.")
    return named


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a backbone as timm keeps them; the mask token, which it lacks, is left out."""
    named = {name: tensor for name, tensor in weights.items() if name != "mask_token"}
    if "register_tokens" in named:
        named["reg_token"] = named.pop("register_tokens")
        positions = named["pos_embed"]
        named["cls_token"] = named["cls_token"] + positions[:, :1]
        named["pos_embed"] = positions[:, 1:].clone()
    for index in sorted({name.split(".")[1] for name in named if name.startswith("blocks.")}):
        _rename(named, f"blocks.{index}.mlp.w12.", f"blocks.{index}.mlp.fc1.")
        _rename(named, f"blocks.{index}.mlp.w3.", f"blocks.{index}.mlp.fc2.")
    return named


def timm_files(teacher: TeacherConfig, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """`config.json`, with which `timm.create_model("local-dir:DIR")` builds the network.

    Args:
        teacher: What is written.
        weights: Under the reference's names.
    """
    backbone, size = teacher.backbone, teacher.image_size_pixels
    dimensions, registers = backbone.dimensions, backbone.num_register_tokens
    arguments: dict[str, Any] = {
        "img_size": size,
        "patch_size": backbone.patch_size_pixels,
        "in_chans": backbone.num_channels,
        "embed_dim": dimensions.embed_dim,
        "depth": dimensions.depth,
        "num_heads": dimensions.num_heads,
        "mlp_ratio": dimensions.mlp_ratio,
        "init_values": backbone.layer_scale,
    }
    if backbone.feed_forward == "swiglu":
        gated_dim = weights["blocks.0.mlp.w3.weight"].shape[1]
        arguments["mlp_ratio"] = (2 * gated_dim + 0.5) / dimensions.embed_dim  # timm rounds down
    config = {
        "architecture": timm_architecture(backbone),
        "num_classes": 0,
        "num_features": dimensions.embed_dim,
        "global_pool": "token",
        "model_args": arguments | ({"reg_tokens": registers} if registers else {}),
        "pretrained_cfg": {
            "input_size": [backbone.num_channels, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
            "mean": list(teacher.mean),
            "std": list(teacher.standard_deviation),
            "num_classes": 0,
        },
    }
    return {"config.json": config}


def timm_architecture(backbone: Backbone) -> str:
    """Network of timm's DINOv2 family that has the parts; sizes are given as its arguments.

    No argument of a plain configuration names SwiGLU, hence the giant, which has it.
    """
    sizes = {d: TIMM_SIZES[name] for name, d in ARCHITECTURES.items() if name in TIMM_SIZES}
    size = sizes.get(backbone.dimensions, "vit_small")
    is_swiglu = backbone.feed_forward == "swiglu"
    if is_swiglu or size == "vit_giant":
        size = "vit_giant" if is_swiglu else "vit_small"
    return f"{size}_patch14_{'reg4_' if backbone.num_register_tokens else ''}dinov2"


def _rename(named: dict[str, Tensor], old: str, new: str) -> None:
    """Replace a prefix of names in place."""
    for ending in ("weight", "bias"):
        if old + ending in named:
            named[new + ending] = named.pop(old + ending)
