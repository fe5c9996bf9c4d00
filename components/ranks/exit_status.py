"""How the ranks of a job ended, told from the files that they left."""

from __future__ import annotations

from components.ranks.job import PREEMPTED, Failure, RanksJob, first_failure
from components.runtime.stage import StageFailed


class Preempted(SystemExit):
    """The ranks were told to stop and can be continued; the process ends with code 75."""

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        """The message."""
        return self.message


def check_outcome(job: RanksJob, *, code: int) -> None:
    """Make sure that the ranks left all that they were to make.

    Args:
        job: What they were told.
        code: Exit code of their parent.

    Raises:
        StageFailed: A rank failed or was killed.
        Preempted: The ranks were told to stop and saved what they had.
    """
    failure = first_failure(job.directory)
    if failure is not None:
        raise StageFailed(in_words(failure))
    if job.is_finished():
        return
    if code == PREEMPTED:
        raise Preempted(f"stopped {job.how_far()}; start again to continue")
    raise StageFailed(
        f"the ranks ended with code {code} and no result, so one of them was killed (out of "
        "memory?); start again to continue from what they saved"
    )


def in_words(failure: Failure) -> str:
    """A failure for a person: what can be fixed says so itself, for others the rank is named."""
    where = "" if failure.can_be_fixed else f"rank {failure.rank} failed: "
    return f"{where}{failure.message}"
