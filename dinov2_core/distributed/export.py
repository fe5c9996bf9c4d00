"""One file with the full weights of a module."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def export_weights(module: nn.Module, *, path: Path) -> str:
    """Write all parameters in full and in fp32 to one safetensors file. Collective.

    Gathers one parameter after the other, keeps them on rank 0 only, and replaces the file at
    once.

    Args:
        module: Sharded or not; the keys are its parameters' names.
        path: File to write.

    Returns:
        Hex sha256 of the file, on every rank.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if is_writer:
            weights[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
    digest = [_write(weights, path=path) if is_writer else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(digest, src=0)
    return digest[0]


def _write(weights: dict[str, Tensor], *, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(weights, partial, metadata={"format": "pt"})
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    partial.replace(path)
    return digest
