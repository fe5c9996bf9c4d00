"""Strict loading: every name of a module and of a file is accounted for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2_core.errors import InputError
from dinov2_core.vit.patch_embed import PatchGrid
from dinov2_core.vit.position import resample_positions

POSITIONS = "pos_embed"
"""Last part of the names of learned positions, [1, 1 + M * M, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Every name of a module and of a file, by how it was treated."""

    loaded: tuple[str, ...]
    """Copied as they were."""
    resampled: tuple[str, ...]
    """Positions resampled to another grid."""
    missing: tuple[str, ...]
    """In the module only; kept their values."""
    unexpected: tuple[str, ...]
    """In the file only; left out."""

    @property
    def summary(self) -> str:
        """The counts, on one line."""
        return (
            f"{len(self.loaded)} loaded, {len(self.resampled)} resampled, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )

    def text(self) -> str:
        """All names, in four sections."""
        sections = {
            "loaded": self.loaded,
            "resampled": self.resampled,
            "missing (kept their first values)": self.missing,
            "unexpected (left out)": self.unexpected,
        }
        lines = []
        for title, names in sections.items():
            lines += [f"{title}: {len(names)}", *(f"  {name}" for name in names)]
        return "\n".join(lines) + "\n"


@torch.no_grad()
def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    resamples_positions: bool = False,
    allowed_missing: Collection[str] = (),
) -> LoadReport:
    """Fill a module that is not sharded yet, every name accounted for.

    Args:
        module: Receives the weights; its parameters' names are the keys.
        weights: By the same names.
        source: Where they are from, for messages.
        resamples_positions: Whether positions may be of another grid; see `resample_to_side`.
        allowed_missing: Prefixes of names that the weights may lack.

    Raises:
        InputError: A name is on one side only and not allowed to be, a shape differs, or a value
            is not finite. The module is unchanged.
    """
    parameters = dict(module.named_parameters())
    missing = sorted(set(parameters) - set(weights))
    unexpected = sorted(set(weights) - set(parameters))
    not_allowed = [name for name in missing if not name.startswith(tuple(allowed_missing))]
    _check_names(not_allowed, source=source, problem="lacks")
    _check_names(unexpected, source=source, problem="also holds")
    fitting, resampled = {}, []
    for name in sorted(set(parameters) & set(weights)):
        parameter, weight = parameters[name], weights[name]
        if resamples_positions and _is_other_grid(name, parameter=parameter, weight=weight):
            weight = resample_to_side(weight.float(), math.isqrt(parameter.shape[1] - 1))
            resampled.append(name)
        _check_values(name, parameter=parameter, weight=weight, source=source)
        fitting[name] = weight
    for name, weight in fitting.items():
        parameters[name].copy_(weight)
    return LoadReport(
        loaded=tuple(name for name in fitting if name not in resampled),
        resampled=tuple(resampled),
        missing=tuple(missing),
        unexpected=(),
    )


def resample_to_side(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + M * M, D] on a grid of side x side patches, bicubic."""
    grid = PatchGrid(height=side, width=side)
    return resample_positions(positions, grid=grid, offset=0.0, antialias=True)


def _check_names(names: list[str], *, source: str, problem: str) -> None:
    if names:
        raise InputError(
            f"{source} {problem} {len(names)} parameters: {', '.join(names)}; give weights of "
            "the same architecture and heads"
        )


def _check_values(name: str, *, parameter: Tensor, weight: Tensor, source: str) -> None:
    if weight.shape != parameter.shape:
        raise InputError(
            f"{name} has shape {list(weight.shape)} in {source} but {list(parameter.shape)} in "
            "the model; give weights of the same architecture, patch size and heads"
        )
    if not torch.isfinite(weight).all():
        raise InputError(
            f"{name} in {source} holds values that are not finite; give weights without "
            "NaN and infinity"
        )


def _is_other_grid(name: str, *, parameter: Tensor, weight: Tensor) -> bool:
    return (
        name.rpartition(".")[2] == POSITIONS
        and weight.dim() == 3
        and 1 < weight.shape[1] != parameter.shape[1]
        and weight.shape[2] == parameter.shape[2]
        and math.isqrt(weight.shape[1] - 1) ** 2 == weight.shape[1] - 1
    )
