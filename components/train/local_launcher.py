"""Starts the ranks of a training on this machine and tells how they ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from components.train.job import Job, Result, forget_outcome, write_job
from components.train.outcome import outcome

logger = logging.getLogger(__name__)

GRACE_SECONDS = 120
"""How long ranks may take to finish their step and write a checkpoint after SIGTERM."""


def run_ranks(job: Job, *, lock: int) -> Result:
    """Run all ranks of a job with torchrun until they end.

    Args:
        job: What to train.
        lock: Descriptor of the directory's lock, which the ranks' parent keeps as well.

    Returns:
        What rank 0 left.

    Raises:
        StageFailed: A rank failed or was killed.
        Preempted: The ranks were told to stop and wrote a checkpoint.
    """
    forget_outcome(job)
    write_job(job)
    process = subprocess.Popen(
        _command(job),
        env={"KINETO_LOG_LEVEL": "99"}  # the profiler talks to standard error
        | os.environ
        | {"OMP_NUM_THREADS": str(job.stage.topology.threads_per_process)},
        pass_fds=(lock,),
        start_new_session=True,
    )
    with _stopped_with_us(process):
        code = process.wait()
    return outcome(job, ended=f"with code {code}")


def _command(job: Job) -> list[str]:
    return [
        sys.executable,
        "-m",
        "components.train.agent",
        "--standalone",
        f"--nproc-per-node={job.stage.topology.processes_per_node}",
        f"--shutdown-timeout={GRACE_SECONDS}",
        "-m",
        "components.train.worker",
        job.uri,
    ]


@contextmanager
def _stopped_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM and an interrupt on to the ranks, and leave none of them behind."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        logger.info("stopping: the ranks finish their step and write a checkpoint")
        process.terminate()

    earlier = {name: signal.signal(name, stop) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in earlier.items():
            signal.signal(name, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
