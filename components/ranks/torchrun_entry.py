"""The ranks' parent: torchrun that tells how they ended by exit codes a cluster can act on."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from components.ranks.job import (
    PREEMPTED,
    WRONG_INPUT,
    first_failure,
    forget_outcome,
    text_of_job,
)
from components.runtime.logging import set_up_logging
from components.runtime.processes import die_with_parent
from components.runtime.storage import StorageError

logger = logging.getLogger(__name__)

USER_ERROR = 64
"""Exit code (EX_USAGE): wrong input, which another attempt would not put right."""
STOPPING = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 120
"""How long ranks may take to save what they are at after SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; 0 done, 64 wrong input, 75 stopped with all saved, 1 any other failure.

    A module and its job, a path or a URI, are run with torchrun's settings from PET_*, as pods of
    a job have them. Otherwise the arguments are torchrun's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    die_with_parent()
    if len(arguments) != 2 or arguments[0].startswith("-"):
        return run_ranks(arguments)
    return run_node(*arguments)


def run_node(worker: str, job_uri: str) -> int:
    """Run this node's ranks of a job that may have other nodes; the exit code.

    The first node forgets how an earlier attempt ended: the others wait for it to meet them.
    """
    set_up_logging()
    directory = job_uri.rpartition("/")[0]
    try:
        text_of_job(job_uri)
    except ValueError as error:
        logger.error("%s", error)
        return 1 if isinstance(error, StorageError) else USER_ERROR
    if os.environ.get("PET_NODE_RANK", "0") == "0":
        forget_outcome(directory)
    code = run_ranks([f"--shutdown-timeout={GRACE_SECONDS}", "-m", worker, job_uri])
    if code != 1:
        return code
    # A rank of another node may have met wrong input, of which this one's only saw the hang-up.
    failure = first_failure(directory)
    return USER_ERROR if failure is not None and failure.can_be_fixed else 1


def run_ranks(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; it always ends with 1, here the ranks' codes tell."""
    logging.disable(logging.ERROR)  # ranks leave the reason of a failure in a file
    for number in STOPPING:
        signal.signal(number, _stop_once)
    try:
        torchrun.main(["--signals-to-handle=SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if WRONG_INPUT in codes:
            return USER_ERROR
        return PREEMPTED if codes == {PREEMPTED} else 1
    except SignalException:
        return PREEMPTED
    return 0


def _stop_once(number: int, _frame: FrameType | None) -> None:
    """Let torchrun stop the ranks at the first request.

    A service manager and the stage may both send one, and torchrun would end the time that ranks
    have to save what they are at when it gets the second.
    """
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise SignalException(f"signal {number}", sigval=signal.Signals(number))


if __name__ == "__main__":
    sys.exit(main())
