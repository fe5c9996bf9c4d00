"""Image and run in containers: make test-containers."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from k8s.launchers import Processes
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.pipelines.engine import BASE, NoEngine, build_image, docker_engine
from tests.pipelines.specs import DEMO, REPOSITORY, demo_values, small_values, write_spec

IMAGE = "dinopipe:test"
COMMIT = "0123abc"
PROGRAMS = ("curate", "train", "evaluate", "register")
PLANTED = secrets.token_hex(16)
"""A secret of the shell that builds the image."""
TWO_STAGES = """
python3 -m components.curate --config "$1" --context "$4" --output /tmp/dataset.json
python3 -m components.train --phase pretrain --config "$2" --context "$4" --launcher "$3" \\
    --dataset /tmp/dataset.json --output /tmp/checkpoint.json
python3 -c "import json; print(json.load(open('/tmp/checkpoint.json'))['step'])"
"""

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
    """The variant for CPUs, out of Debian's packages and PyPI alone."""
    with pytest.MonkeyPatch.context() as shell:
        shell.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
        return build_image(
            IMAGE, REPOSITORY, VARIANT="cpu", CPU_BASE=BASE, CPU_WHEELS="", GIT_COMMIT=COMMIT
        )


def in_a_closed_pod(
    engine: docker.DockerClient, image: str, *command: str, pile: Path | None = None
) -> str:
    """What a program says as the restricted profile runs it: no root, nothing to write but /tmp."""
    output: bytes = engine.containers.run(
        image,
        list(command),
        remove=True,
        user="10001",
        volumes=[f"{pile}:{pile}:ro"] if pile else [],
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
    assert config["Labels"]["org.opencontainers.image.revision"] == COMMIT
    assert f"DINOPIPE_GIT_COMMIT={COMMIT}" in config["Env"]


def test_no_secret_is_in_the_image(engine: docker.DockerClient, image: str) -> None:
    made = engine.images.get(image)
    told = json.dumps([made.history(), made.attrs])
    assert COMMIT in told
    assert PLANTED not in told
    words = ("password", "secret", "token", "credential")
    assert not [word for word in words if word in told.lower()]


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


def test_stages_work_without_rights(
    engine: docker.DockerClient, image: str, pile: Path, tmp_path: Path
) -> None:
    pile.chmod(0o755)
    spec = small_spec(pile, tmp_path)
    said = in_a_closed_pod(
        engine, image, "sh", "-ec", TWO_STAGES, "sh",
        spec.curate_stage.model_dump_json(),
        spec.pretrain_stage.model_dump_json(),
        Processes().model_dump_json(),
        json.dumps({"workdir": "/tmp/work", "run_id": "r", "run_name": "r"}),
        pile=pile,
    )  # fmt: skip
    assert said.split()[-1] == "12"


def test_neither_kubeflow_nor_a_compiler_is_in_the_image(
    engine: docker.DockerClient, image: str
) -> None:
    program = (
        "import importlib.util as u, shutil as s; "
        "print(u.find_spec('kfp'), *map(s.which, ('cc', 'gcc', 'g++', 'clang', 'nvcc')))"
    )
    assert in_a_closed_pod(engine, image, "python3", "-c", program).split() == ["None"] * 6


def small_spec(pile: Path, folder: Path) -> PipelineSpec:
    return load_spec(write_spec(small_values(pile), folder / "spec.yaml"))


def run_in_containers(spec: Path, workdir: Path) -> list[str]:
    command = [sys.executable, "-m", "pipelines", "run", spec, "--workdir", workdir]
    return [*map(str, command), "--runner", "docker"]


def test_the_whole_demo_runs_in_containers(image: str, tmp_path: Path) -> None:
    values = absolute(demo_values())
    spec = write_spec({**values, "image": image}, tmp_path / "spec.yaml")
    ended = subprocess.run(
        run_in_containers(spec, tmp_path / "work"), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "work" / "run.json").read_text())
    assert result["status"] == "succeeded"
    assert list(result["stages"]) == ["curate", "pretrain", "finetune", "evaluate", "register"]
    assert result["mlflow"]["alias"] == "champion"
    numbers = result["metrics"]
    assert numbers["fashion_mnist/knn_top1"] > numbers["fashion_mnist/knn_top1_untrained"]


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """The demo's values for a spec in another folder."""
    text = json.dumps(values).replace('"../demo/', f'"{DEMO.parents[1] / "demo"}/')
    absolute_values: dict[str, Any] = json.loads(text)
    return absolute_values


def test_an_interrupted_run_leaves_no_container_and_goes_on(
    engine: docker.DockerClient, image: str, pile: Path, tmp_path: Path
) -> None:
    values = small_values(pile, pretrain__learning__optimization__num_steps=40)
    spec = write_spec({**values, "image": image}, tmp_path / "spec.yaml")
    command = run_in_containers(spec, tmp_path / "work")
    for end in (signal.SIGINT, signal.SIGTERM):
        said = interrupted(command, end=end)
        assert "with a checkpoint" in said
        assert "[finetune]" not in said
        assert engine.containers.list(all=True, filters={"ancestor": image}) == []
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming" in again.stdout
    result = json.loads((tmp_path / "work" / "run.json").read_text())
    assert len(result["stages"]) == 5
    assert result["metrics"]["pretrain/step"] == 40


def interrupted(command: list[str], *, end: signal.Signals) -> str:
    """What a run says that gets a signal as it trains.

    No terminal passes it on, and Kubeflow would run all stages to their end.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if "training · step" in line and not any("training · step" in before for before in said):
            process.send_signal(end)
        said.append(line)
    assert process.wait() == {signal.SIGINT: 130, signal.SIGTERM: 143}[end], "".join(said)
    return "".join(said)
