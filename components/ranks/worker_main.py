"""The main function of a worker: one rank with its job, SIGTERM, and errors for the launcher."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from components.ranks.job import RanksJob, write_failure
from components.runtime.logging import log_error, set_up_logging
from components.runtime.processes import die_with_parent
from components.runtime.retry import ONCE, retrying_with
from dinov2_core.errors import DinopipeError, ExitCode

AnyJob = TypeVar("AnyJob", bound=RanksJob)


def run_rank(
    argv: Sequence[str] | None,
    *,
    kind: type[AnyJob],
    work: Callable[[AnyJob, threading.Event], bool],
) -> int:
    """Do a rank's work; 0 finished, 75 stopped with all saved, else as the error's class says.

    Args:
        argv: The job's file, a path or a URI.
        kind: Type of the job.
        work: Does it, and returns whether it is finished; False once the event was set.
    """
    parser = argparse.ArgumentParser(description="One rank of a stage.")
    parser.add_argument("job", help="job file that the launcher wrote: a path or an s3:// URI")
    uri: str = parser.parse_args(argv).job
    die_with_parent()
    set_up_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.set())
    try:
        return ExitCode.DONE if work(kind.read(uri), stop) else ExitCode.STOPPED
    except Exception as error:
        code = log_error(error)
        rank = int(os.environ.get("RANK", "0"))
        with retrying_with(ONCE), suppress(DinopipeError, OSError):  # the log has it as well
            write_failure(uri.rpartition("/")[0], rank=rank, error=error)
        return code
