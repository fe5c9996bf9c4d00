"""The frame of one rank: its job, SIGTERM, and errors that are told to the launcher."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from components.ranks.job import PREEMPTED, WRONG_INPUT, RanksJob, write_failure
from components.runtime.logging import set_up_logging
from components.runtime.processes import die_with_parent
from components.runtime.storage import StorageError, StoreUnreachable

AnyJob = TypeVar("AnyJob", bound=RanksJob)


def run_rank(
    argv: Sequence[str] | None,
    *,
    kind: type[AnyJob],
    work: Callable[[AnyJob, threading.Event], bool],
    wrong_input: tuple[type[Exception], ...] = (),
) -> int:
    """Do a rank's work; 0 finished, 75 stopped with all saved, 2 wrong input.

    Args:
        argv: The job's file, a path or a URI.
        kind: Of the job.
        work: Does it, until it is done or the event is set; tells which.
        wrong_input: Errors, besides ValueError, that a person can put right.
    """
    parser = argparse.ArgumentParser(description="One rank of a stage.")
    parser.add_argument("job", help="job file that the launcher wrote: a path or an s3:// URI")
    args = parser.parse_args(argv)
    die_with_parent()
    set_up_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.set())
    job = kind.read(args.job)
    to_be_fixed: tuple[type[Exception], ...] = (ValueError, *wrong_input)
    try:
        return 0 if work(job, stop) else PREEMPTED
    except StoreUnreachable as error:  # of no input's making: worth another attempt
        _tell(job, error, can_be_fixed=False)
        raise
    except to_be_fixed as error:
        _tell(job, error, can_be_fixed=True)
        return WRONG_INPUT
    except Exception as error:
        _tell(job, error, can_be_fixed=False)
        raise


def _tell(job: RanksJob, error: Exception, *, can_be_fixed: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    with suppress(StorageError):  # what went wrong is told by the log as well
        write_failure(job.directory, rank=rank, error=error, can_be_fixed=can_be_fixed)
