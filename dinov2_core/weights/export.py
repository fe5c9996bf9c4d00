"""Writes a backbone so that timm or Hugging Face transformers load it, and checks the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinov2_core.backbones import BackboneNetwork
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.models import build_backbone
from dinov2_core.weights.huggingface_layout import (
    from_huggingface,
    huggingface_files,
    to_huggingface,
)
from dinov2_core.weights.loading import load_weights
from dinov2_core.weights.timm_layout import timm_files, to_timm
from dinov2_core.weights_file import write_weights

Format = Literal["timm", "huggingface"]

WEIGHTS = "model.safetensors"
TOLERANCE = 1e-4
"""Largest difference of tokens of length about 1, float32 on the CPU."""


def write_export(
    teacher: TeacherConfig, weights: Mapping[str, Tensor], *, target: Format, directory: Path
) -> str:
    """Write weights and configuration, load them again, and compare.

    timm's network is built from the written files and must give the same tokens. Hugging Face
    transformers is not part of this program: there, names are mapped back and must give every
    weight bit for bit, which proves the mapping and not the other program's arithmetic.

    Args:
        teacher: Architecture, and how images are preprocessed.
        weights: Of the backbone, by the reference's names, without a prefix.
        target: Program that shall load it.
        directory: Gets `model.safetensors` and `config.json`.

    Returns:
        What was compared, in a sentence.

    Raises:
        InputError: The weights do not fit the architecture.
        RuntimeError: The loaded network differs.
    """
    network = build_backbone(teacher.backbone, image_size_pixels=teacher.image_size_pixels).eval()
    load_weights(network, weights, source="the teacher")
    match target:
        case "timm":
            named, files = to_timm(weights), timm_files(teacher, weights)
        case "huggingface":
            named, files = to_huggingface(weights), huggingface_files(teacher)
    write_weights(named, path=directory / WEIGHTS)
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    if target == "timm":
        return _compare_with_timm(teacher, network=network, directory=directory)
    return _compare_names(weights, path=directory / WEIGHTS)


@torch.no_grad()
def _compare_with_timm(teacher: TeacherConfig, *, network: BackboneNetwork, directory: Path) -> str:
    """Tokens of timm's network, built from the written files, against ours."""
    import timm  # takes seconds, and nothing else here needs it

    other = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=True).eval()
    backbone, size = teacher.backbone, teacher.image_size_pixels
    shape = (2, backbone.num_channels, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = network.features(images)
    tokens = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    difference = (other.forward_features(images) - tokens).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, tokens.abs().max().item()):
        raise RuntimeError(
            f"timm's network in {directory} differs by {difference:.3g} from the teacher; "
            "do not use it, and report the architecture"
        )
    note = ""
    if backbone.position_offset or not backbone.position_antialias:
        note = "; at other sizes timm resamples positions in its own way"
    return f"timm's tokens differ by at most {difference:.1e} at {size} pixels{note}"


def _compare_names(weights: Mapping[str, Tensor], *, path: Path) -> str:
    """Every weight of the written file against the teacher's, through the names back."""
    found = from_huggingface(load_file(path))
    same = found.keys() == weights.keys() and all(
        torch.equal(found[name], weights[name]) for name in found
    )
    if not same:
        raise RuntimeError(
            f"{path} does not give the teacher back; do not use it, and report the architecture"
        )
    return (
        f"all {len(found)} weights come back bit for bit through the names of Hugging Face; "
        "transformers itself was not run"
    )
