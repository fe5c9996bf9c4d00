"""Dinov2Model and Dinov2WithRegistersModel of Hugging Face transformers: names and settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.vit.block import NORM_EPSILON

TOKEN_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
LAYER_NAMES = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale2.lambda1": "ls2.gamma",
}
PROJECTIONS = ("query", "key", "value")
"""In the order in which the reference stacks them to `qkv`."""
LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias|)$")
BLOCK = re.compile(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias|)$")
QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv(\.weight|\.bias)$")


def huggingface_prefix(names: Iterable[str]) -> str:
    """What the network's own names follow in a larger one, such as `dinov2.` in a classifier."""
    ending = "embeddings.cls_token"
    return next((name.removesuffix(ending) for name in names if name.endswith("." + ending)), "")


def is_huggingface(weights: Mapping[str, Tensor]) -> bool:
    """Whether names are those of Hugging Face."""
    return any(name.startswith(("embeddings.", "encoder.layer.")) for name in weights)


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the reference's names; query, key and value become one projection.

    A name that is not known stays as it is, and so do projections of which one is absent.
    """
    named = {_reference_name(name): tensor for name, tensor in weights.items()}
    for name in [name for name in named if f".attention.attention.{PROJECTIONS[0]}" in name]:
        parts = [name.replace(f".{PROJECTIONS[0]}.", f".{part}.") for part in PROJECTIONS]
        if all(part in named for part in parts):
            stacked = torch.cat([named.pop(part) for part in parts])
            layer, ending = name.split(".")[2], name.rpartition(".")[2]
            named[f"blocks.{layer}.attn.qkv.{ending}"] = stacked
    return named


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a backbone under the names of Hugging Face, one projection cut into three."""
    tokens = {ours: theirs for theirs, ours in TOKEN_NAMES.items()}
    parts = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    named = {}
    for name, tensor in weights.items():
        if found := QKV.match(name):
            for part, rows in zip(PROJECTIONS, tensor.chunk(3), strict=True):
                path = f"encoder.layer.{found[1]}.attention.attention.{part}{found[2]}"
                named[path] = rows.clone()
        elif found := BLOCK.match(name):
            named[f"encoder.layer.{found[1]}.{parts[found[2]]}{found[3]}"] = tensor
        else:
            named[tokens[name]] = tensor
    return named


def huggingface_files(teacher: TeacherConfig) -> dict[str, dict[str, Any]]:
    """`config.json` of the network, and `preprocessor_config.json` with the evaluation's resizing.

    That is: the shorter side to 256/224 of the size, the centre, mean and deviation.
    """
    backbone, size = teacher.backbone, teacher.image_size_pixels
    dimensions, registers = backbone.dimensions, backbone.num_register_tokens
    ratio = dimensions.mlp_ratio
    network = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": dimensions.embed_dim,
        "num_hidden_layers": dimensions.depth,
        "num_attention_heads": dimensions.num_heads,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "hidden_act": "gelu",
        "use_swiglu_ffn": backbone.feed_forward == "swiglu",
        "qkv_bias": True,
        "layerscale_value": backbone.layer_scale,
        "layer_norm_eps": NORM_EPSILON,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": size,
        "patch_size": backbone.patch_size_pixels,
        "num_channels": backbone.num_channels,
        "torch_dtype": "float32",
    } | ({"num_register_tokens": registers} if registers else {})
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(teacher.mean),
        "image_std": list(teacher.standard_deviation),
        "do_convert_rgb": backbone.num_channels == 3,
    }
    return {"config.json": network, "preprocessor_config.json": preprocessing}


def _reference_name(name: str) -> str:
    if found := LAYER.match(name):
        part = LAYER_NAMES.get(found[2])
        return f"blocks.{found[1]}.{part}{found[3]}" if part else name
    return TOKEN_NAMES.get(name, name)
