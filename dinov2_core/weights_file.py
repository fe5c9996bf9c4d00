"""Writes weights to one safetensors file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_weights(weights: Mapping[str, Tensor], *, path: Path) -> str:
    """Replace a file at once, readable by whom the umask allows.

    Args:
        weights: By name; contiguous, and no two share memory.
        path: File to write; its directory is made.

    Returns:
        Hex sha256 of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    save_file(dict(weights), partial, metadata={"format": "pt"})
    partial.chmod(mode)  # safetensors makes files that only their owner may read
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    partial.replace(path)
    return digest
