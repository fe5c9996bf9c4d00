"""One file with the full weights of a module, and strict loading of such a file."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

POSITIONS = "pos_embed"
"""Last part of the names of learned positions, [1, 1 + M * M, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What became of every name in a module and in a file."""

    loaded: tuple[str, ...]
    """Taken over as they were."""
    resampled: tuple[str, ...]
    """Positions taken over to another grid."""
    missing: tuple[str, ...]
    """In the module only; kept their values."""
    unexpected: tuple[str, ...]
    """In the file only; left out."""


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


@torch.no_grad()
def load_teacher_weights(
    module: nn.Module,
    *,
    path: Path,
    resample: Callable[[Tensor, int], Tensor],
    allowed_missing: Collection[str] = (),
    allowed_unexpected: Collection[str] = (),
) -> LoadReport:
    """Fill a module that is not sharded yet from an exported file, every key accounted for.

    Args:
        module: Takes the weights; its parameters' names are the keys.
        path: Safetensors file.
        resample: Maps positions [1, 1 + M * M, D] and a side m to positions [1, 1 + m * m, D].
        allowed_missing: Prefixes of names that the file may lack.
        allowed_unexpected: Prefixes of names that only the file may have.

    Returns:
        What became of every name.

    Raises:
        ValueError: The file is absent or no safetensors file, a name is on one side only and not
            allowed to be, or a shape differs in anything but the grid of positions.
    """
    parameters = dict(module.named_parameters())
    weights = _read(path)
    missing = sorted(set(parameters) - set(weights))
    unexpected = sorted(set(weights) - set(parameters))
    _refuse(missing, allowed=allowed_missing, path=path, problem="lacks")
    _refuse(unexpected, allowed=allowed_unexpected, path=path, problem="also holds")
    loaded, resampled = [], []
    for name in sorted(set(parameters) & set(weights)):
        parameter, weight = parameters[name], weights[name]
        if _is_other_grid(name, parameter=parameter, weight=weight):
            weight = resample(weight.float(), _side(parameter))
            resampled.append(name)
        else:
            loaded.append(name)
        if weight.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {list(weight.shape)} in {path} but {list(parameter.shape)} in "
                "the model; give weights of the same architecture, patch size and heads"
            )
        parameter.copy_(weight)
    return LoadReport(
        loaded=tuple(loaded),
        resampled=tuple(resampled),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"weights {path} do not exist; name an existing file") from error
    except SafetensorError as error:
        raise ValueError(
            f"weights {path} are not a safetensors file ({error}); export them again"
        ) from error


def _refuse(names: list[str], *, allowed: Collection[str], path: Path, problem: str) -> None:
    refused = [name for name in names if not name.startswith(tuple(allowed))]
    if refused:
        raise ValueError(
            f"{path} {problem} {len(refused)} parameters: {', '.join(refused)}; give weights of "
            "the same architecture and heads"
        )


def _is_other_grid(name: str, *, parameter: Tensor, weight: Tensor) -> bool:
    return (
        name.rpartition(".")[2] == POSITIONS
        and weight.dim() == 3
        and weight.shape[1] != parameter.shape[1]
        and weight.shape[2] == parameter.shape[2]
    )


def _side(positions: Tensor) -> int:
    """Patches on a side of the square grid that positions [1, 1 + m * m, D] belong to."""
    return math.isqrt(positions.shape[1] - 1)


def _write(weights: dict[str, Tensor], *, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(weights, partial, metadata={"format": "pt"})
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    partial.replace(path)
    return digest
