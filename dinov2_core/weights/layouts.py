"""Recognises whose names a state dict has, and gives its weights this project's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dinov2_core.errors import InputError
from dinov2_core.weights.huggingface_layout import (
    from_huggingface,
    huggingface_prefix,
    is_huggingface,
)
from dinov2_core.weights.reading import StateDict
from dinov2_core.weights.timm_layout import from_timm, is_timm

Layout = Literal["reference", "timm", "huggingface"]

BACKBONE = "backbone."
HEADS = ("dino_head.", "ibot_head.")
TEACHER = "teacher."
OTHER_STATE = ("student.", "dino_loss.", "ibot_patch_loss.", "dino_targets.", "ibot_targets.")
"""Prefixes of what a training program's file holds beside its teacher."""
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+\.)")
PROTOTYPE_NAMES = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingWeights:
    """A teacher under this project's names."""

    source: str
    """File it comes from, for messages."""
    layout: Layout
    """Whose names the file has."""
    weights: dict[str, Tensor]
    """`backbone.*`, `dino_head.*`, `ibot_head.*`; what is not known keeps its name."""
    left_out: tuple[str, ...]
    """Names of the file that belong to no teacher: student, optimizer, centres, classifier."""

    @property
    def backbone(self) -> dict[str, Tensor]:
        """Weights of the backbone alone, without the prefix."""
        return {
            name.removeprefix(BACKBONE): tensor
            for name, tensor in self.weights.items()
            if name.startswith(BACKBONE)
        }

    @property
    def absent(self) -> tuple[str, ...]:
        """Names that other programs do not have and training starts at 0: the mask token."""
        return () if self.layout == "reference" else (f"{BACKBONE}mask_token",)

    def has_head(self, head: str) -> bool:
        """Whether any weight of a head, such as `dino_head`, is there."""
        return any(name.startswith(f"{head}.") for name in self.weights)


def with_own_names(state: StateDict) -> StartingWeights:
    """Give weights this project's names.

    Accepts the releases and checkpoints of the reference implementation (arXiv:2304.07193), with
    flat or chunked blocks and wrapped by whatever trained them; files of this project; and the
    networks of timm and of Hugging Face, the latter with a classifier or without.

    Raises:
        InputError: Two names of the file stand for the same weight.
    """
    tensors, left_out = _of_teacher(_renamed(state.tensors, _unwrapped, source=state.source))
    heads = {k: v for k, v in tensors.items() if k.startswith(HEADS)}
    rest = {k: v for k, v in tensors.items() if k not in heads}
    prefix = huggingface_prefix(rest)
    if not prefix and any(name.startswith(BACKBONE) for name in rest):
        prefix = BACKBONE
    bare = {k.removeprefix(prefix): v for k, v in rest.items() if k.startswith(prefix)}
    others = {k: v for k, v in rest.items() if not k.startswith(prefix)}
    if prefix != BACKBONE:  # what a classifier or a segmentation head has besides
        left_out, others = (*left_out, *others), {}
    layout: Layout = "reference"
    if is_huggingface(bare):
        layout, bare = "huggingface", from_huggingface(bare)
    elif is_timm(bare) and not heads:
        layout, bare = "timm", from_timm(bare)
    else:
        bare = _renamed(bare, _flat_block, source=state.source)
    return StartingWeights(
        source=state.source,
        layout=layout,
        weights={
            **{BACKBONE + name: tensor for name, tensor in bare.items()},
            **_renamed(heads, _plain_prototypes, source=state.source),
            **others,
        },
        left_out=(*state.left_out, *left_out),
    )


def _of_teacher(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The teacher's part of a training program's state, and the names that belong to others."""
    if not any(name.startswith(TEACHER) for name in tensors):
        return tensors, ()
    left_out = tuple(name for name in tensors if name.startswith(OTHER_STATE))
    return {k.removeprefix(TEACHER): v for k, v in tensors.items() if k not in left_out}, left_out


def _unwrapped(name: str) -> str:
    return WRAPPERS.sub("", name)


def _flat_block(name: str) -> str:
    return CHUNKED_BLOCK.sub(r"blocks.\1", name)


def _plain_prototypes(name: str) -> str:
    head, _, part = name.partition(".")
    return f"{head}.{PROTOTYPE_NAMES.get(part, part)}"


def _renamed(
    tensors: Mapping[str, Tensor], rename: Callable[[str], str], *, source: str
) -> dict[str, Tensor]:
    named = {rename(name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        names = [rename(name) for name in tensors]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"{source} holds {', '.join(twice)} more than once; save one network only")
    return named
