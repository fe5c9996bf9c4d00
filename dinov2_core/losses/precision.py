"""Losses are computed in float32, whatever the surrounding autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off inside the block, on devices that have it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


@contextmanager
def bfloat16_units() -> Iterator[None]:
    """Let a CPU compute float32 matrix products with its bfloat16 units, summed in float32.

    Exact for factors that came from bfloat16. A CPU without matrix units takes oneDNN's float32
    kernel instead of the usual library's. A setting of the process, restored afterwards.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  (made at import)
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
