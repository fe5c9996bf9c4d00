"""The ranks' parent: torchrun with exit codes by which a cluster decides about another attempt."""

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

from components.ranks.job import first_failure, remove_earlier_result, text_of_job
from components.runtime.logging import log_error, set_up_logging
from components.runtime.processes import die_with_parent
from dinov2_core.errors import DinopipeError, ExitCode

STOPPING = (signal.SIGTERM, signal.SIGINT)

GRACE_SECONDS = 120
"""How long ranks may take after SIGTERM to save their state."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; 0 done, 64 user error, 75 stopped with all saved, 1 any other failure.

    A module and its job, a path or a URI, are run with torchrun's settings from PET_*, as pods of
    a job have them. Otherwise the arguments are torchrun's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    die_with_parent()
    if len(arguments) != 2 or arguments[0].startswith("-"):
        return run_ranks(arguments)
    set_up_logging()
    try:
        return run_node(*arguments)
    except DinopipeError as error:
        return _pod_code(log_error(error))


def run_node(worker: str, job_uri: str) -> int:
    """Run this node's ranks of a job that may have other nodes; the exit code.

    The first node removes what an earlier attempt left: the others wait for it to meet them.
    """
    directory = job_uri.rpartition("/")[0]
    text_of_job(job_uri)
    if os.environ.get("PET_NODE_RANK", "0") == "0":
        remove_earlier_result(directory)
    code = run_ranks([f"--shutdown-timeout={GRACE_SECONDS}", "-m", worker, job_uri])
    if code != ExitCode.FAILED:
        return code
    # A rank of another node may have met a user error, of which this one's only saw the hang-up.
    failure = first_failure(directory)
    is_user_error = failure is not None and failure.is_user_error
    return ExitCode.POD_USER_ERROR if is_user_error else code


def run_ranks(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; it always ends with 1, here the ranks' codes decide."""
    # torchrun logs every failure as a table of its own; the ranks have logged the reason.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in STOPPING:
        signal.signal(number, _stop_once)
    try:
        torchrun.main(["--signals-to-handle=SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if ExitCode.USER_ERROR in codes:
            return ExitCode.POD_USER_ERROR
        return ExitCode.STOPPED if codes == {ExitCode.STOPPED} else ExitCode.FAILED
    except SignalException:
        return ExitCode.STOPPED
    return ExitCode.DONE


def _pod_code(code: ExitCode) -> ExitCode:
    return ExitCode.POD_USER_ERROR if code == ExitCode.USER_ERROR else code


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
