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
from components.train.job import Job
from dinov2_core import errors

def main():
    with worker_process(None, kind=Job) as (job, stop):
        print("at work", flush=True)
        {work}

sys.exit(main())
"""


@pytest.fixture
def job(stage: TrainStage, tmp_path: Path) -> Job:
    job = Job(
        stage_name="pretrain",
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
    ("work", "code", "message", "is_user_error"),
    [
        ("raise errors.SettingsError('a smaller batch')", 2, "a smaller batch", True),
        ("raise errors.StoreUnavailable('later')", 1, "later", False),
        ("raise ValueError('a shape')", 1, "ValueError: a shape", False),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken", False),
    ],
)
def test_a_failure_is_left_for_the_launcher(
    job: Job, work: str, code: int, message: str, is_user_error: bool
) -> None:
    assert start(job, work).wait(timeout=60) == code
    failure = first_failure(job.directory)
    assert failure is not None
    assert (failure.rank, failure.message) == (3, message)
    assert failure.is_user_error == is_user_error


def test_finished_and_stopped_are_told_apart(job: Job) -> None:
    assert start(job, "return 0").wait(timeout=60) == 0
    waiting = start(job, "return 75 if stop.wait(60) else 1")
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "at work\n"
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=60) == 75
    assert first_failure(job.directory) is None


@pytest.mark.parametrize("work", ["raise errors.SettingsError('a smaller batch')", "1 / 0"])
def test_every_rank_logs_what_ended_it(job: Job, work: str) -> None:
    ended = start(job, work)
    _, log = ended.communicate(timeout=60)
    expected = "[rank 3] a smaller batch" if "errors" in work else "ZeroDivisionError"
    assert expected in log
    assert ("Traceback" in log) == ("errors" not in work)


def test_a_job_that_cannot_be_read_from_a_dead_store_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    code = RANK.format(work="return 0")
    command = [sys.executable, "-c", code, "s3://bucket/stage/job.json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "S3 is not reachable for s3://bucket/stage/job.json" in ended.stderr
    assert "Traceback" not in ended.stderr
