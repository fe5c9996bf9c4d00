"""Image and run in containers: make test-containers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.pipelines.engine import NoEngine, docker_engine
from tests.pipelines.specs import REPOSITORY, small_values, write_spec

IMAGE = "dinopipe:test"
PROGRAMS = ("curate", "train", "evaluate", "register")

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    try:
        with docker_engine() as client:
            yield client
    except NoEngine as error:
        pytest.fail(str(error))


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient) -> str:
    """Built by the command that the Dockerfile names, without BuildKit, which Debian lacks."""
    ended = subprocess.run(
        ["docker", "build", "-q", "-t", IMAGE, "--build-arg", "GIT_COMMIT=0123abc", REPOSITORY],
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return IMAGE


def in_a_closed_pod(engine: docker.DockerClient, image: str, *command: str) -> str:
    """What a program says as the restricted profile runs it: no root, nothing to write but /tmp."""
    output: bytes = engine.containers.run(
        image,
        list(command),
        remove=True,
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        network_mode="none",
    )
    return output.decode()


def test_the_image_says_what_it_is(engine: docker.DockerClient, image: str) -> None:
    config = engine.images.get(image).attrs["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert "DINOPIPE_GIT_COMMIT=0123abc" in config["Env"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_start_without_rights(
    program: str, engine: docker.DockerClient, image: str
) -> None:
    said = in_a_closed_pod(engine, image, "python3", "-m", f"components.{program}", "--help")
    assert "--executor-input" in said


def test_ranks_start_without_rights(engine: docker.DockerClient, image: str) -> None:
    program = "import getpass, os, torch; print(getpass.getuser(), os.getuid(), torch.ones(2).sum().item())"
    assert in_a_closed_pod(engine, image, "python3", "-c", program).split() == [
        "dinopipe",
        "10001",
        "2.0",
    ]


def test_neither_kubeflow_nor_a_compiler_is_in_the_image(
    engine: docker.DockerClient, image: str
) -> None:
    program = (
        "import importlib.util as u, shutil as s; "
        "print(u.find_spec('kfp'), s.which('cc'), s.which('gcc'), s.which('pip3'))"
    )
    said = in_a_closed_pod(engine, image, "python3", "-c", program)
    assert said.split()[:3] == ["None"] * 3


def run_command(image: str, pile: Path, folder: Path) -> list[str]:
    spec = write_spec({**small_values(pile), "image": image}, folder / "spec.yaml")
    command = [sys.executable, "-m", "pipelines", "run", spec, "--workdir", folder / "work"]
    return [*map(str, command), "--runner", "docker"]


def test_all_stages_run_in_containers(image: str, pile: Path, tmp_path: Path) -> None:
    command = run_command(image, pile, tmp_path)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "work" / "run.json").read_text())
    assert result["status"] == "succeeded"
    assert len(result["stages"]) == 5


def test_an_interrupt_reaches_the_container(
    engine: docker.DockerClient, image: str, pile: Path, tmp_path: Path
) -> None:
    """No terminal passes it on, and Kubeflow would run all stages to their end."""
    process = subprocess.Popen(
        run_command(image, pile, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "training · step 1/" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130, "".join(said)
    assert "with a checkpoint" in "".join(said)
    assert engine.containers.list() == []
    assert "[finetune]" not in "".join(said)
