"""Starts the ranks of a job on this machine and waits for their end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from components.ranks.exit_status import check_exit_status
from components.ranks.job import RanksJob, remove_earlier_result
from dinov2_core.errors import ExitCode

logger = logging.getLogger(__name__)

GRACE_SECONDS = 120
"""How long ranks may take after SIGTERM to save their state."""


def run_ranks(job: RanksJob, *, lock: int) -> None:
    """Run all ranks of a job with torchrun until they end.

    Args:
        job: That they work on.
        lock: Descriptor of the directory's lock, which the ranks' parent keeps as well.

    Raises:
        UserError: A rank met what the user must change.
        StageFailed: A rank failed or was killed.
        Stopped: The ranks were stopped and saved what they had.
    """
    remove_earlier_result(job.directory)
    job.write()
    process = subprocess.Popen(
        _command(job),
        env={"KINETO_LOG_LEVEL": "99"}  # the profiler writes to standard error
        | os.environ
        | {"OMP_NUM_THREADS": str(job.topology.threads_per_process)},
        pass_fds=(lock,),
        start_new_session=True,
    )
    with _stopped_together(process):
        code = process.wait()
    was_starting = code == -signal.SIGTERM  # later torchrun handles the signal
    check_exit_status(job, code=ExitCode.STOPPED if was_starting else code)


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
def _stopped_together(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM and an interrupt on to the ranks; kill them if this process fails."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        logger.info("stopping: the ranks save their state")
        process.terminate()

    earlier = {name: signal.signal(name, stop) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for name, handler in earlier.items():
            signal.signal(name, handler)
