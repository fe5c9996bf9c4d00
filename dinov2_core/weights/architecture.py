"""The settings of a backbone that the shapes of its weights show."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dinov2_core.config.backbone import ARCHITECTURES
from dinov2_core.errors import InputError

BLOCK = re.compile(r"blocks\.(\d+)\.")
PATCH_WEIGHT = "patch_embed.proj.weight"
SHOWN_NAMES = 5

Settings = dict[str, int | str]
"""By their names in `Dimensions` and `Backbone`, and `hidden_dim`, which follows from mlp_ratio."""


def settings_of(backbone: Mapping[str, Tensor], *, source: str) -> Settings:
    """Settings that the weights of a vision transformer belong to, as far as shapes show them.

    Args:
        backbone: Weights under the reference's names, without a prefix.
        source: Where they are from, for messages.

    Raises:
        InputError: They belong to no vision transformer that is known here.
    """
    blocks = [int(found[1]) for name in backbone if (found := BLOCK.match(name))]
    projection = backbone.get(PATCH_WEIGHT)
    if projection is None or projection.dim() != 4 or not blocks:
        shown = ", ".join(list(backbone)[:SHOWN_NAMES]) or "nothing"
        raise InputError(
            f"{source} holds no vision transformer whose names are known; it begins with {shown}. "
            "Give weights of DINOv2 (Meta, timm, Hugging Face) or of this program"
        )
    embed_dim, num_channels, patch_size, _ = projection.shape
    gated = backbone.get("blocks.0.mlp.w3.weight")
    last = backbone.get("blocks.0.mlp.fc2.weight") if gated is None else gated
    registers = backbone.get("register_tokens")
    return {
        "embed_dim": embed_dim,
        "depth": max(blocks) + 1,
        "patch_size_pixels": patch_size,
        "num_channels": num_channels,
        "feed_forward": "mlp" if gated is None else "swiglu",
        "hidden_dim": 0 if last is None else last.shape[1],
        "num_register_tokens": 0 if registers is None else registers.shape[1],
    }


def check_same_backbone(
    given: Mapping[str, Tensor], needed: Mapping[str, Tensor], *, source: str
) -> None:
    """Check that weights belong to a backbone, before names and shapes are compared.

    Args:
        given: Weights under the reference's names, without a prefix.
        needed: Parameters of the backbone that the spec describes.
        source: Where the weights are from, for messages.

    Raises:
        InputError: They do not; the message names the settings that they need.
    """
    theirs, ours = settings_of(given, source=source), settings_of(needed, source="the model")
    if theirs["embed_dim"] != ours["embed_dim"]:
        ours["hidden_dim"] = theirs["hidden_dim"]  # follows from the width
    differing: dict[str, list[str]] = {}
    for name, value in theirs.items():
        if value != ours[name]:
            fact = f"its {name} is {value} and the spec's {ours[name]}"
            differing.setdefault(_advice(name, theirs), []).append(fact)
    if differing:
        facts = [f"{', '.join(facts)}: set {advice}" for advice, facts in differing.items()]
        raise InputError(
            f"{source} holds another network; {'; '.join(facts)}; or give other weights"
        )


def _advice(name: str, settings: Settings) -> str:
    """Key of the spec, and its value, that makes the network like the given one."""
    match name:
        case "embed_dim" | "depth":
            dim, depth = settings["embed_dim"], settings["depth"]
            named = [
                name
                for name, size in ARCHITECTURES.items()
                if (size.embed_dim, size.depth) == (dim, depth)
            ]
            own = f"dimensions with embed_dim {dim} and depth {depth}"
            return f"backbone.architecture to {named[0] if named else own}"
        case "hidden_dim":
            return f"backbone.architecture with the mlp_ratio that gives {settings[name]}"
        case _:
            return f"backbone.{name} to {settings[name]}"
