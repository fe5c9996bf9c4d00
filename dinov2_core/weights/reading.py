"""Reads the tensors of a weights file; nothing in it is ever executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov2_core.errors import InputError

CONTAINERS = ("teacher", "model", "state_dict")
"""Names under which training programs keep the state dict, the most specific first."""
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of what `torch.save` writes: a zip archive, or a bare pickle in the old format."""
SHOWN_NAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """What a file holds."""

    source: str
    """The file, for messages."""
    tensors: dict[str, Tensor]
    """By the names in the file."""
    left_out: tuple[str, ...] = ()
    """Names beside the state dict, such as the optimizer's."""


def read_state_dict(path: Path) -> StateDict:
    """Read a safetensors file, or a state dict that `torch.save` wrote.

    Args:
        path: File to read. A state dict may lie below `teacher`, `model` or `state_dict`.

    Returns:
        Tensors on the CPU, names as in the file.

    Raises:
        InputError: There is no such file, it is neither of the two, or it holds other things
            than tensors.
    """
    try:
        with path.open("rb") as file:
            is_pickle = file.read(4).startswith(PICKLE_STARTS)
    except OSError as error:
        raise InputError(
            f"weights {path} cannot be read ({error.strerror}); name an existing file"
        ) from error
    return _read_torch(path) if is_pickle else _read_safetensors(path)


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"weights {path} are not a safetensors file ({error}), nor a state dict of torch.save; "
            "export them again"
        ) from error
    return StateDict(source=str(path), tensors=tensors)


def _read_torch(path: Path) -> StateDict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for damaged files has no common class
        raise InputError(
            f"weights {path} are damaged, or hold more than tensors and plain values, which is not "
            f"loaded because it could run code ({type(error).__name__}); save the state dict alone"
        ) from error
    left_out: list[str] = []
    while container := _container(content):
        left_out += [name for name in content if name != container]
        content = content[container]
    if not _is_state_dict(content):
        names = list(content)[:SHOWN_NAMES] if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"weights {path} hold no state dict but {names}; save tensors by name, bare or below "
            f"one of {', '.join(CONTAINERS)}"
        )
    return StateDict(source=str(path), tensors=content, left_out=tuple(left_out))


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _container(content: object) -> str:
    """Name of the state dict within a training program's file; empty if it is one itself."""
    if not isinstance(content, dict):
        return ""
    return next((name for name in CONTAINERS if isinstance(content.get(name), dict)), "")
