"""torchrun_entry: torchrun's flags or a pod's environment, and exit codes that a cluster can act on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.ranks.job import first_failure, write_failure
from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.tracking import Tracker
from components.train.config import TrainStage
from components.train.job import Job, read_result
from dinov2_core.errors import ExitCode, SettingsError

ENTRY = [sys.executable, "-W", "ignore", "-m", "components.ranks.torchrun_entry"]


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    return Job(
        stage_name="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id=Tracker(context).stage("pretrain", key="k").run_id,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def start(job: Job) -> subprocess.Popen[bytes]:
    """The node of a pod; Trainer's variables are all it gets."""
    job.write()
    trainer = {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }
    return subprocess.Popen([*ENTRY, job.worker, job.uri], env=os.environ | trainer)


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("sys.exit('a message')", 1, "a message"),
        ("sys.exit(2)", 64, ""),
        ("sys.exit(75)", ExitCode.STOPPED, ""),
        ("os.kill(os.getpid(), 9)", 1, ""),
        ("pass", 0, ""),
    ],
)
def test_the_exit_code_follows_from_those_of_the_ranks(
    ending: str, code: int, message: str, tmp_path: Path
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import os, sys\n{ending}\n")
    ended = subprocess.run(
        [*ENTRY, "--standalone", str(script)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    assert ended.stderr.strip() == message


def test_a_user_error_is_never_retried(job: Job, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"not one")
    job = job.model_copy(update={"starting_weights": str(weights)})
    assert start(job).wait(timeout=120) == 64
    failure = first_failure(job.directory)
    assert failure is not None
    assert failure.is_user_error


def test_a_stopped_node_writes_a_checkpoint_and_goes_on_later(job: Job) -> None:
    write_failure(job.directory, rank=3, error=SettingsError("of an earlier attempt"))
    node = start(job)
    end = time.monotonic() + 120
    while not (job.checkpoints / "step_00000005").exists():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    for _ in range(3):  # as where a service manager sends it to all processes, and the stage too
        node.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert node.wait(timeout=120) == ExitCode.STOPPED
    stopped = read_result(job)
    assert stopped is not None
    assert not stopped.is_finished
    assert first_failure(job.directory) is None
    assert start(job).wait(timeout=120) == 0
    finished = read_result(job)
    assert finished is not None
    assert finished.step == 60


def test_a_missing_job_is_a_user_error(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*ENTRY, Job.worker, str(tmp_path / "absent.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 64
    assert "absent.json does not exist" in ended.stderr


def test_a_store_that_is_away_when_a_pod_starts_is_no_user_error(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's pods start again: the outage may be over then."""
    job = job.model_copy(update={"starting_weights": "s3://bucket/weights"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert start(job).wait(timeout=120) == 1
    failure = first_failure(job.directory)
    assert failure is not None
    assert not failure.is_user_error
    assert failure.message.startswith("S3 is not reachable for s3://bucket/weights")
