"""How the ranks of a training ended, told from the files that they left."""

from __future__ import annotations

from components.runtime.stage import StageFailed
from components.train.job import PREEMPTED, Failure, Job, Result, first_failure, read_result


class Preempted(SystemExit):
    """The training was told to stop and can be continued; the process ends with code 75."""

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        """The message."""
        return self.message


def outcome(job: Job, *, ended: str) -> Result:
    """What the ranks left when they ended.

    Args:
        job: What was trained.
        ended: How their parent ended, in words, such as `with code 1`.

    Raises:
        StageFailed: A rank failed or was killed.
        Preempted: The ranks were told to stop and wrote a checkpoint.
    """
    failure = first_failure(job)
    if failure is not None:
        raise StageFailed(in_words(failure))
    result = read_result(job)
    if result is None:
        raise StageFailed(
            f"the ranks ended {ended} and no result, so one of them was killed (out of "
            "memory?); start again to continue from the last checkpoint"
        )
    if not result.is_finished:
        raise Preempted(
            f"stopped after step {result.step}, with a checkpoint; start again to continue"
        )
    return result


def in_words(failure: Failure) -> str:
    """A failure for a person: what can be fixed says so itself, for others the rank is named."""
    where = "" if failure.can_be_fixed else f"rank {failure.rank} failed: "
    return f"{where}{failure.message}"
