"""The same run in containers; needs a Docker engine with the image: make test-containers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import docker
import pytest

from tests.pipelines.specs import REPOSITORY, small_values, write_spec

IMAGE = "dinopipe:test"

pytestmark = pytest.mark.containers


@pytest.fixture(scope="module")
def image() -> str:
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    client.images.build(path=str(REPOSITORY), tag=IMAGE, rm=True)
    return IMAGE


def test_all_stages_run_in_containers(image: str, pile: Path, tmp_path: Path) -> None:
    values = {**small_values(pile), "image": image}
    spec = write_spec(values, tmp_path / "spec.yaml")
    workdir = tmp_path / "work"
    command = [sys.executable, "-m", "pipelines", "run", spec, "--workdir", workdir]
    ended = subprocess.run(
        [*map(str, command), "--runner", "docker"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((workdir / "run.json").read_text())
    assert result["status"] == "succeeded"
    assert len(result["stages"]) == 5
