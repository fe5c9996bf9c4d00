"""Which kind of device code is written for, where that decides how something is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_planned: str | None = None


def device_kind(tensor: Tensor) -> str:
    """Kind of device (cpu, cuda) whose way of computing to take for a tensor.

    It is the tensor's own, or the one that a step is planned for.
    """
    return _planned or tensor.device.type


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Compute on tensors without data as a device of this kind would. Not thread-safe."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before
