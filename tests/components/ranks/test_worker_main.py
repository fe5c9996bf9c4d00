"""worker_main: how a rank ends, and what it leaves for its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.ranks.job import first_failure
from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.job import Job

RANK = """
import sys
from components.ranks.worker_main import worker_process
from components.runtime.storage import StoreUnreachable
from components.train.job import Job
from dinov2_core.errors import TrainingDiverged

def main():
    with worker_process(None, kind=Job) as process:
        print("at work", flush=True)
        {work}
    return process.exit_code

sys.exit(main())
"""


@pytest.fixture
def job(stage: TrainStage, tmp_path: Path) -> Job:
    job = Job(
        phase="pretrain",
        stage=stage,
        context=RunContext(workdir=str(tmp_path), run_name="test"),
        directory=str(tmp_path / "stage"),
        shards="",
        mlflow_run_id="",
    )
    job.write()
    return job


def start(job: Job, work: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RANK.format(work=work), job.uri],
        env=os.environ | {"RANK": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("work", "code", "message", "can_be_fixed"),
    [
        ("raise ValueError('a smaller batch')", 2, "a smaller batch", True),
        ("raise TrainingDiverged('lower the rate')", 2, "lower the rate", True),
        ("raise StoreUnreachable('later')", 1, "StoreUnreachable: later", False),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken", False),
    ],
)
def test_a_failure_is_left_for_the_launcher(
    job: Job, work: str, code: int, message: str, can_be_fixed: bool
) -> None:
    assert start(job, work).wait(timeout=60) == code
    failure = first_failure(job.directory)
    assert failure is not None
    assert (failure.rank, failure.message) == (3, message)
    assert failure.can_be_fixed == can_be_fixed


def test_finished_and_stopped_are_told_apart(job: Job) -> None:
    assert start(job, "process.end(is_finished=True)").wait(timeout=60) == 0
    waiting = start(job, "process.end(is_finished=not process.stop.wait(60))")
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "at work\n"
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=60) == 75
    assert first_failure(job.directory) is None
