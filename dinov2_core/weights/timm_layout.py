"""Names and conventions of timm's vision transformers, as far as DINOv2 uses them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

FC1_WEIGHT = re.compile(r"(blocks\.\d+\.mlp\.)fc1\.weight$")


def from_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the reference's names.

    timm has no mask token. With registers its positions leave out the cls token's, which is
    already added to the cls token: it becomes 0 here. A packed SwiGLU is named like an MLP and
    told by fc1 being twice as wide as fc2.
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


def _rename(named: dict[str, Tensor], old: str, new: str) -> None:
    """Replace a prefix of names in place."""
    for ending in ("weight", "bias"):
        if old + ending in named:
            named[new + ending] = named.pop(old + ending)
