"""The process of one rank: its job, SIGTERM, and errors that are left for the launcher."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from components.ranks.job import PREEMPTED, WRONG_INPUT, RanksJob, write_failure
from components.runtime.logging import set_up_logging
from components.runtime.processes import die_with_parent
from components.runtime.storage import StorageError, StoreUnreachable
from dinov2_core.errors import UserError

AnyJob = TypeVar("AnyJob", bound=RanksJob)


@dataclass(slots=True)
class WorkerProcess(Generic[AnyJob]):
    """One rank's process."""

    job: AnyJob
    """What its ranks do together."""
    stop: threading.Event
    """Set by SIGTERM: save what is done and end."""
    exit_code: int = 0
    """Set by the work, or by what it raised."""

    def end(self, *, is_finished: bool) -> None:
        """Set the exit code of work that is finished, or stopped with all saved."""
        self.exit_code = 0 if is_finished else PREEMPTED


@contextmanager
def worker_process(
    argv: Sequence[str] | None, *, kind: type[AnyJob]
) -> Iterator[WorkerProcess[AnyJob]]:
    """Make this process a rank; an error of the work is left for the launcher.

    What a user can fix ends the work with exit code 2, any other error is raised again. As a
    context manager it adds no frame to the work's stack.

    Args:
        argv: The job's file, a path or a URI.
        kind: Of the job.
    """
    parser = argparse.ArgumentParser(description="One rank of a stage.")
    parser.add_argument("job", help="job file that the launcher wrote: a path or an s3:// URI")
    args = parser.parse_args(argv)
    die_with_parent()
    set_up_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.set())
    process = WorkerProcess(job=kind.read(args.job), stop=stop)
    try:
        yield process
    except StoreUnreachable as error:  # of no input's making: worth another attempt
        _tell(process.job, error, can_be_fixed=False)
        raise
    except (UserError, ValueError) as error:
        _tell(process.job, error, can_be_fixed=True)
        process.exit_code = WRONG_INPUT
    except Exception as error:
        _tell(process.job, error, can_be_fixed=False)
        raise


def _tell(job: RanksJob, error: Exception, *, can_be_fixed: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    with suppress(StorageError):  # what went wrong is told by the log as well
        write_failure(job.directory, rank=rank, error=error, can_be_fixed=can_be_fixed)
