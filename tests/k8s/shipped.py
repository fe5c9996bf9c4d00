"""The manifests that the package ships."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "k8s"
DIGEST = "sha256:" + "5e" * 32
"""Of an image that somebody set."""
EXTRA_COMPONENTS = ("external-secrets", "shared-volume", "single-user")
"""What no overlay for GPUs has by itself."""

Manifest = dict[str, Any]
Build = Callable[[Path], list[Manifest]]


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy with one thing different, at a dotted path; ... removes it."""
    manifest = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    here: Any = manifest
    for key in parents:
        here = here[int(key)] if isinstance(here, list) else here[key]
    if value is ...:
        del here[last]
    else:
        here[last] = value
    return manifest
