"""Starts the ranks of a job on this machine and tells how they ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from components.ranks.exit_status import check_outcome
from components.ranks.job import PREEMPTED, RanksJob, forget_outcome

logger = logging.getLogger(__name__)

GRACE_SECONDS = 120
"""How long ranks may take to save what they are at after SIGTERM."""


def run_ranks(job: RanksJob, *, lock: int) -> None:
    """Run all ranks of a job with torchrun until they end.

    Args:
        job: What to do.
        lock: Descriptor of the directory's lock, which the ranks' parent keeps as well.

    Raises:
        StageFailed: A rank failed or was killed.
        Preempted: The ranks were told to stop and saved what they had.
    """
    forget_outcome(job.directory)
    job.write()
    process = subprocess.Popen(
        _command(job),
        env={"KINETO_LOG_LEVEL": "99"}  # the profiler talks to standard error
        | os.environ
        | {"OMP_NUM_THREADS": str(job.topology.threads_per_process)},
        pass_fds=(lock,),
        start_new_session=True,
    )
    with _stopped_with_us(process):
        code = process.wait()
    was_starting = code == -signal.SIGTERM  # later torchrun handles the signal
    check_outcome(job, code=PREEMPTED if was_starting else code)


def _command(job: RanksJob) -> list[str]:
    return [
        sys.executable,
        "-m",
        "components.ranks.torchrun_entry",
        "--standalone",
        "--local-addr=localhost",  # the machine's own name is unknown where there is no network
        f"--nproc-per-node={job.topology.processes_per_node}",
        f"--shutdown-timeout={GRACE_SECONDS}",
        "-m",
        job.worker,
        job.uri,
    ]


@contextmanager
def _stopped_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM and an interrupt on to the ranks, and leave none of them behind."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        logger.info("stopping: the ranks finish what they are at and save it")
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
