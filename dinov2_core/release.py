"""Writes a backbone so that timm or Hugging Face transformers load it, checked before it counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2_core.config.backbone import ARCHITECTURES, Backbone
from dinov2_core.models import build_backbone
from dinov2_core.vit.block import NORM_EPSILON
from dinov2_core.vit.transformer import VisionTransformer
from dinov2_core.weights.huggingface_layout import from_huggingface, to_huggingface
from dinov2_core.weights.loading import load_weights
from dinov2_core.weights.timm_layout import to_timm

Format = Literal["timm", "huggingface"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOLERANCE = 1e-4
"""Largest difference of tokens of length about 1, float32 on the CPU."""
TIMM_SIZES = {
    "vit_small": "vit_small",
    "vit_base": "vit_base",
    "vit_large": "vit_large",
    "vit_giant2": "vit_giant",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A teacher's backbone and how images reach it."""

    backbone: Backbone
    """Architecture."""
    weights: dict[str, Tensor]
    """By the reference's names, without a prefix."""
    image_size_pixels: int
    """Resolution whose grid of positions the weights hold."""
    mean: tuple[float, ...]
    """Per channel, subtracted from values in [0, 1]."""
    standard_deviation: tuple[float, ...]
    """Per channel, divides what is left."""


def write_release(released: Released, *, target: Format, directory: Path) -> str:
    """Write weights and configuration, load them again, and compare.

    timm's network is built from the written files and must give the same tokens. Hugging Face
    transformers is not part of this program: there, names are mapped back and must give every
    weight bit for bit, which proves the mapping and not the other program's arithmetic.

    Args:
        released: What is written.
        target: Who shall load it.
        directory: Gets `model.safetensors` and `config.json`.

    Returns:
        What was compared, in a sentence.

    Raises:
        ValueError: The weights do not fit the architecture, or the loaded network differs.
    """
    network = _network(released)
    directory.mkdir(parents=True, exist_ok=True)
    match target:
        case "timm":
            weights, config = to_timm(released.weights), timm_config(released)
        case "huggingface":
            weights, config = to_huggingface(released.weights), huggingface_config(released)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if target == "timm":
        return _compare_with_timm(released, network=network, directory=directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps(_huggingface_preprocessing(released), indent=2) + "\n", encoding="utf-8"
    )
    return _compare_names(released, directory=directory)


def timm_config(released: Released) -> dict[str, Any]:
    """Configuration with which timm builds the network: `create_model("local-dir:DIR")`."""
    backbone, size = released.backbone, released.image_size_pixels
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
        gated_dim = released.weights["blocks.0.mlp.w3.weight"].shape[1]
        arguments["mlp_ratio"] = (2 * gated_dim + 0.5) / dimensions.embed_dim  # timm rounds down
    return {
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
            "mean": list(released.mean),
            "std": list(released.standard_deviation),
            "num_classes": 0,
        },
    }


def timm_architecture(backbone: Backbone) -> str:
    """Network of timm's DINOv2 family that has the parts; sizes are given as its arguments.

    A SwiGLU is a part that no argument of a plain configuration names, hence the giant there.
    """
    sizes = {d: TIMM_SIZES[name] for name, d in ARCHITECTURES.items() if name in TIMM_SIZES}
    size = sizes.get(backbone.dimensions, "vit_small")
    is_swiglu = backbone.feed_forward == "swiglu"
    if is_swiglu or size == "vit_giant":
        size = "vit_giant" if is_swiglu else "vit_small"
    return f"{size}_patch14_{'reg4_' if backbone.num_register_tokens else ''}dinov2"


def huggingface_config(released: Released) -> dict[str, Any]:
    """Configuration of Dinov2Model, or of Dinov2WithRegistersModel."""
    backbone = released.backbone
    dimensions, registers = backbone.dimensions, backbone.num_register_tokens
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": dimensions.embed_dim,
        "num_hidden_layers": dimensions.depth,
        "num_attention_heads": dimensions.num_heads,
        "mlp_ratio": _whole(dimensions.mlp_ratio),
        "hidden_act": "gelu",
        "use_swiglu_ffn": backbone.feed_forward == "swiglu",
        "qkv_bias": True,
        "layerscale_value": backbone.layer_scale,
        "layer_norm_eps": NORM_EPSILON,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": released.image_size_pixels,
        "patch_size": backbone.patch_size_pixels,
        "num_channels": backbone.num_channels,
        "torch_dtype": "float32",
    } | ({"num_register_tokens": registers} if registers else {})


def _huggingface_preprocessing(released: Released) -> dict[str, Any]:
    """The shorter side to 256/224 of the size, the centre, mean and deviation: as in evaluation."""
    size = released.image_size_pixels
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(released.mean),
        "image_std": list(released.standard_deviation),
        "do_convert_rgb": released.backbone.num_channels == 3,
    }


def _whole(ratio: float) -> float | int:
    return int(ratio) if ratio == int(ratio) else ratio


def _network(released: Released) -> VisionTransformer:
    """Our own network with the weights, in eval mode; raises where they do not fit."""
    size = released.image_size_pixels
    network = build_backbone(released.backbone, image_size_pixels=size)
    report = load_weights(
        network,
        released.weights,
        source="the teacher",
        resample=lambda positions, _: positions,
    )
    assert not report.missing, report.missing
    assert not report.unexpected, report.unexpected
    return network.eval()


@torch.no_grad()
def _compare_with_timm(released: Released, *, network: VisionTransformer, directory: Path) -> str:
    """Tokens of timm's network, built from the written files, against ours."""
    import timm  # takes seconds, and nothing else here needs it

    other = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=True).eval()
    size = released.image_size_pixels
    shape = (2, released.backbone.num_channels, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = network.features(images)
    tokens = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    difference = (other.forward_features(images) - tokens).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, tokens.abs().max().item()):
        raise ValueError(
            f"timm's network in {directory} differs by {difference:.3g} from the teacher; "
            "do not use it, and report the architecture"
        )
    note = ""
    if released.backbone.position_offset or not released.backbone.position_antialias:
        note = "; at other sizes timm resamples positions in its own way"
    return f"timm's tokens differ by at most {difference:.1e} at {size} pixels{note}"


def _compare_names(released: Released, *, directory: Path) -> str:
    """Every weight of the written file against the teacher's, through the names back."""
    found = from_huggingface(load_file(directory / WEIGHTS))
    same = found.keys() == released.weights.keys() and all(
        torch.equal(found[name], released.weights[name]) for name in found
    )
    if not same:
        raise ValueError(
            f"{directory / WEIGHTS} does not give the teacher back; do not use it, and report the "
            "architecture"
        )
    return (
        f"all {len(found)} weights come back bit for bit through the names of Hugging Face; "
        "transformers itself was not run"
    )
