"""Strict loading: every name of a module and of a file is accounted for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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

    @property
    def summary(self) -> str:
        """The counts, on one line."""
        return (
            f"{len(self.loaded)} loaded, {len(self.resampled)} resampled, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )

    def text(self) -> str:
        """Every name below what became of it."""
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
    resample: Callable[[Tensor, int], Tensor],
    allowed_missing: Collection[str] = (),
    allowed_unexpected: Collection[str] = (),
) -> LoadReport:
    """Fill a module that is not sharded yet, every name accounted for.

    Args:
        module: Takes the weights; its parameters' names are the keys.
        weights: By the same names.
        source: Where they are from, for messages.
        resample: Maps positions [1, 1 + M * M, D] and a side m to positions [1, 1 + m * m, D].
        allowed_missing: Prefixes of names that the weights may lack.
        allowed_unexpected: Prefixes of names that only the weights may have.

    Returns:
        What became of every name.

    Raises:
        ValueError: A name is on one side only and not allowed to be, a shape differs in anything
            but the grid of positions, or a value is not finite. The module is unchanged.
    """
    parameters = dict(module.named_parameters())
    missing = sorted(set(parameters) - set(weights))
    unexpected = sorted(set(weights) - set(parameters))
    _refuse(missing, allowed=allowed_missing, source=source, problem="lacks")
    _refuse(unexpected, allowed=allowed_unexpected, source=source, problem="also holds")
    fitting, resampled = {}, []
    for name in sorted(set(parameters) & set(weights)):
        parameter, weight = parameters[name], weights[name]
        if _is_other_grid(name, parameter=parameter, weight=weight):
            weight = resample(weight.float(), _side(parameter))
            resampled.append(name)
        _check(name, parameter=parameter, weight=weight, source=source)
        fitting[name] = weight
    for name, weight in fitting.items():
        parameters[name].copy_(weight)
    return LoadReport(
        loaded=tuple(name for name in fitting if name not in resampled),
        resampled=tuple(resampled),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
    )


def _refuse(names: list[str], *, allowed: Collection[str], source: str, problem: str) -> None:
    refused = [name for name in names if not name.startswith(tuple(allowed))]
    if refused:
        raise ValueError(
            f"{source} {problem} {len(refused)} parameters: {', '.join(refused)}; give weights of "
            "the same architecture and heads"
        )


def _check(name: str, *, parameter: Tensor, weight: Tensor, source: str) -> None:
    if weight.shape != parameter.shape:
        raise ValueError(
            f"{name} has shape {list(weight.shape)} in {source} but {list(parameter.shape)} in "
            "the model; give weights of the same architecture, patch size and heads"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} in {source} holds values that are not finite; give weights from before they "
            "were spoilt"
        )


def _is_other_grid(name: str, *, parameter: Tensor, weight: Tensor) -> bool:
    return (
        name.rpartition(".")[2] == POSITIONS
        and weight.dim() == 3
        and weight.shape[1] != parameter.shape[1]
        and weight.shape[2] == parameter.shape[2]
        and math.isqrt(weight.shape[1] - 1) ** 2 == weight.shape[1] - 1
    )


def _side(positions: Tensor) -> int:
    """Patches on a side of the square grid that positions [1, 1 + m * m, D] belong to."""
    return math.isqrt(positions.shape[1] - 1)
