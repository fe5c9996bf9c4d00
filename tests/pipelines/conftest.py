from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
from kfp.dsl import pipeline_task

from tests.k8s.shipped import unpacked_kubectl
from tests.pipelines.kfp_server import KfpServer, running_server
from tests.pipelines.specs import REPOSITORY


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """Real images: PNG files of product photographs."""
    table = parquet.read_table(REPOSITORY / "pipelines/demo/fashion_mnist_train.parquet")
    images: list[bytes] = table["image"].slice(0, 96).to_pylist()
    return images


@pytest.fixture(scope="session")
def pile(photographs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pile")
    for number, content in enumerate(photographs):
        (folder / f"{number:03d}.png").write_bytes(content)
    (folder / "copy.png").write_bytes(photographs[0])
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def server() -> Iterator[KfpServer]:
    """Kubeflow Pipelines on loopback."""
    with running_server() as content:
        yield content


@pytest.fixture(scope="session", autouse=True)
def shallow_stacks() -> None:
    """kfp reads every frame's source to learn its caller's name, which is slow under pytest."""

    def stack() -> list[tuple[str, ...]]:
        return [("",) * 4, ("", "", "", sys._getframe(2).f_code.co_name)]

    pipeline_task.inspect = SimpleNamespace(stack=stack)


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """A shell has its background jobs ignore interrupts, and whatever they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def kubectl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with Kubernetes' own client."""
    return unpacked_kubectl(tmp_path_factory.mktemp("kubectl")).parent


@pytest.fixture
def kubectl(kubectl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kubernetes' own client, where a shell finds it."""
    monkeypatch.setenv("PATH", f"{kubectl_folder}{os.pathsep}{os.environ['PATH']}")
    return kubectl_folder / "kubectl"
