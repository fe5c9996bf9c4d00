"""What the shapes of a vision transformer's weights say about its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

BLOCK = re.compile(r"blocks\.(\d+)\.")
PATCH_WEIGHT = "patch_embed.proj.weight"
SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShape:
    """Architecture of a vision transformer, as far as shapes tell; heads are not among it."""

    embed_dim: int
    """Width D of every token."""
    depth: int
    """Number of blocks."""
    patch_size_pixels: int
    """Side of a square patch."""
    num_channels: int
    """Channels of the images."""
    feed_forward: Literal["mlp", "swiglu"]
    """Feed-forward part of the blocks."""
    hidden_dim: int
    """Width before the last layer of the feed-forward part; 0 without one."""
    num_register_tokens: int
    """Register tokens R."""


def shape_of(backbone: Mapping[str, Tensor], *, source: str) -> NetworkShape:
    """Architecture that the weights of a backbone belong to.

    Args:
        backbone: Weights under the reference's names, without a prefix.
        source: Where they are from, for messages.

    Raises:
        ValueError: They are of no vision transformer that is known here.
    """
    blocks = [int(found[1]) for name in backbone if (found := BLOCK.match(name))]
    if PATCH_WEIGHT not in backbone or not blocks:
        shown = ", ".join(list(backbone)[:SHOWN_NAMES]) or "nothing"
        raise ValueError(
            f"{source} holds no vision transformer whose names are known; it begins with {shown}. "
            "Give weights of DINOv2 (Meta, timm, Hugging Face) or of this program"
        )
    embed_dim, num_channels, patch_size, _ = backbone[PATCH_WEIGHT].shape
    swiglu = backbone.get("blocks.0.mlp.w3.weight")
    last = backbone.get("blocks.0.mlp.fc2.weight") if swiglu is None else swiglu
    registers = backbone.get("register_tokens")
    return NetworkShape(
        embed_dim=embed_dim,
        depth=max(blocks) + 1,
        patch_size_pixels=patch_size,
        num_channels=num_channels,
        feed_forward="mlp" if swiglu is None else "swiglu",
        hidden_dim=0 if last is None else last.shape[1],
        num_register_tokens=0 if registers is None else registers.shape[1],
    )
