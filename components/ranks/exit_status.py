"""How the ranks of a job ended, by their exit code and the files that they left."""

from __future__ import annotations

from components.ranks.job import Failure, RanksJob, first_failure
from dinov2_core.errors import DinopipeError, ExitCode, StageFailed, Stopped, UserError


def check_exit_status(job: RanksJob, *, code: int) -> None:
    """Make sure that the ranks left all that they were to make.

    Args:
        job: That they worked on.
        code: Exit code of their parent.

    Raises:
        UserError: A rank met what the user must change.
        StageFailed: A rank failed or was killed.
        Stopped: The ranks were stopped and saved what they had.
    """
    failure = first_failure(job.directory)
    if failure is not None:
        raise error_of(failure)
    if job.is_finished():
        return
    if code == ExitCode.STOPPED:
        raise Stopped(f"stopped {job.progress_description()}; start again to continue")
    raise StageFailed(
        f"the ranks ended with code {code} and no result, so one of them was killed (out of "
        "memory?); start again to continue from what they saved"
    )


def error_of(failure: Failure) -> DinopipeError:
    """A rank's failure as an error of the stage; unless the user must act the rank is named."""
    if failure.is_user_error:
        return UserError(failure.message)
    return StageFailed(f"rank {failure.rank} failed: {failure.message}")
