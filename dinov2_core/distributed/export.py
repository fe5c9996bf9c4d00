"""One file with the full weights of a module."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2_core.weights_file import write_weights


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
    digest = [write_weights(weights, path=path) if is_writer else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(digest, src=0)
    return digest[0]
