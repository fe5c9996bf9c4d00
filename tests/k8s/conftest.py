from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.shipped import (
    DIGEST,
    EXTRA_COMPONENTS,
    SHIPPED,
    Build,
    Manifest,
    unpacked_kubectl,
)


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kubernetes' own client."""
    return unpacked_kubectl(tmp_path_factory.mktemp("kubectl"))


@pytest.fixture(scope="session")
def build(kubectl: Path) -> Build:
    """`kubectl kustomize`, as manifests."""

    def kustomize(directory: Path) -> list[Manifest]:
        ended = subprocess.run(
            [kubectl, "kustomize", directory], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return list(yaml.safe_load_all(ended.stdout))

    return kustomize


@pytest.fixture(scope="session")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what we ship as somebody changes it: the images set, and nothing else."""
    folder = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for file in folder.glob("overlays/*/kustomization.yaml"):
        text = file.read_text().replace("sha256:" + "0" * 64, DIGEST)
        file.write_text(text.replace("registry.invalid", "registry.example.com"))
    return folder


@pytest.fixture(scope="session")
def installed(build: Build, chosen: Path) -> dict[str, list[Manifest]]:
    """Every overlay as somebody applies it."""
    return {path.name: build(path) for path in sorted((chosen / "overlays").iterdir())}


@pytest.fixture(scope="session")
def extended(build: Build, chosen: Path) -> list[Manifest]:
    """The overlay for GPUs with every component that it leaves out."""
    folder = chosen / "extended"
    folder.mkdir()
    components = [f"../components/{name}" for name in EXTRA_COMPONENTS]
    overlay = yaml.safe_load((chosen / "overlays/prod-gpu/kustomization.yaml").read_text())
    values = {
        "resources": ["../overlays/prod-gpu"],
        "components": components,
        "images": overlay["images"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(values))
    return build(folder)
