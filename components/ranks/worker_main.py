"""The process of a worker: one rank with its job, SIGTERM, and errors for the launcher."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from components.ranks.job import RanksJob, write_failure
from components.runtime.logging import log_error, set_up_logging
from components.runtime.processes import die_with_parent
from components.runtime.retry import ONCE, retrying_with
from dinov2_core.errors import DinopipeError

AnyJob = TypeVar("AnyJob", bound=RanksJob)


@contextmanager
def worker_process(
    argv: Sequence[str] | None, *, kind: type[AnyJob]
) -> Iterator[tuple[AnyJob, threading.Event]]:
    """Make this process a rank: gives its job and the event that SIGTERM sets.

    An error of the work is logged, left for the launcher, and ends the process with the exit code
    of its class. A context manager is no frame on the stack of the work.

    Args:
        argv: The job's file, a path or a URI.
        kind: Type of the job.
    """
    parser = argparse.ArgumentParser(description="One rank of a stage.")
    parser.add_argument("job", help="job file that the launcher wrote: a path or an s3:// URI")
    uri: str = parser.parse_args(argv).job
    die_with_parent()
    set_up_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.set())
    try:
        yield kind.read(uri), stop
    except Exception as error:
        code = log_error(error)
        rank = int(os.environ.get("RANK", "0"))
        with retrying_with(ONCE), suppress(DinopipeError, OSError):  # the log has it as well
            write_failure(uri.rpartition("/")[0], rank=rank, error=error)
        raise SystemExit(int(code)) from error
