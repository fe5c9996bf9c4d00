"""agent: torchrun's flags or a pod's environment, and exit codes that a cluster can act on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.ranks.job import PREEMPTED, first_failure, write_failure
from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.tracking import Tracker
from components.train.config import TrainStage
from components.train.job import Job, read_result

AGENT = [sys.executable, "-W", "ignore", "-m", "components.ranks.torchrun_entry"]


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    return Job(
        phase="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id=Tracker(context).stage("pretrain", key="k").run_id,
    )


def start(job: Job) -> subprocess.Popen[bytes]:
    """The node of a pod; Trainer's variables are all it is told."""
    job.write()
    trainer = {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": "29521",
    }
    return subprocess.Popen([*AGENT, job.worker, job.uri], env=os.environ | trainer)


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("sys.exit('my own words')", 1, "my own words"),
        ("sys.exit(2)", 64, ""),
        ("sys.exit(75)", PREEMPTED, ""),
        ("os.kill(os.getpid(), 9)", 1, ""),
        ("pass", 0, ""),
    ],
)
def test_a_rank_s_ending_has_its_own_code_and_words(
    ending: str, code: int, words: str, tmp_path: Path
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import os, sys\n{ending}\n")
    ended = subprocess.run(
        [*AGENT, "--standalone", str(script)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    assert ended.stderr.strip() == words


def test_wrong_input_is_never_tried_again(job: Job, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"not one")
    job = job.model_copy(update={"starting_weights": str(weights)})
    assert start(job).wait(timeout=120) == 64
    failure = first_failure(job.directory)
    assert failure is not None
    assert failure.can_be_fixed


def test_a_stopped_node_writes_a_checkpoint_and_goes_on_later(job: Job) -> None:
    write_failure(
        job.directory, rank=3, error=ValueError("of an earlier attempt"), can_be_fixed=True
    )
    node = start(job)
    end = time.monotonic() + 120
    while not (job.checkpoints / "step_00000005").exists():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    for _ in range(3):  # as where a service manager sends it to all processes, and the stage too
        node.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert node.wait(timeout=120) == PREEMPTED
    stopped = read_result(job)
    assert stopped is not None
    assert not stopped.is_finished
    assert first_failure(job.directory) is None
    assert start(job).wait(timeout=120) == 0
    finished = read_result(job)
    assert finished is not None
    assert finished.step == 60


def test_a_missing_job_is_wrong_input(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*AGENT, Job.worker, str(tmp_path / "absent.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 64
    assert "absent.json does not exist" in ended.stderr
