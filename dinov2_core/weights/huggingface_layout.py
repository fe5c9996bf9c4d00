"""Names of Dinov2Model and Dinov2WithRegistersModel of Hugging Face transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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


def _reference_name(name: str) -> str:
    if found := LAYER.match(name):
        part = LAYER_NAMES.get(found[2])
        return f"blocks.{found[1]}.{part}{found[3]}" if part else name
    return TOKEN_NAMES.get(name, name)
