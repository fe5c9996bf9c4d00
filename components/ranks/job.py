"""What a launcher tells the ranks of a stage, and what they tell it: small files in one place."""

from __future__ import annotations

import time
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from components.ranks.config import Topology
from components.runtime.context import RunContext
from components.runtime.storage import (
    delete,
    is_remote,
    join_uri,
    list_names,
    local_path,
    read_text,
    write_text,
)
from dinov2_core.config.frozen import Frozen

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL): stopped by SIGTERM with all saved; start again to go on."""
WRONG_INPUT = 2
"""Exit code of a rank that met what a person can put right."""
JOB, RESULT, FAILURES = "job.json", "result.json", "failures"
"""Names in the directory of a stage."""


class RanksJob(Frozen):
    """Everything that a rank needs; every stage that has ranks adds what they do."""

    worker: ClassVar[str]
    """Module of ours that is run as one rank."""
    work: ClassVar[str]
    """What the ranks do, in a word."""

    phase: str
    """Stage that the ranks belong to."""
    context: RunContext
    """Of the pipeline run."""
    directory: str
    """Place of the stage: a directory that all nodes share, or an s3:// URI."""
    mlflow_run_id: str
    """MLflow run of the stage."""

    @property
    @abstractmethod
    def topology(self) -> Topology:
        """How many ranks there are, and where."""

    @abstractmethod
    def is_finished(self) -> bool:
        """Whether the ranks left all that they were to make."""

    @abstractmethod
    def how_far(self) -> str:
        """How far ranks that were stopped came, such as `after step 7, with a checkpoint`."""

    @property
    def root(self) -> Path:
        """Directory of the stage on this node."""
        return local_path(self.directory)

    @property
    def uri(self) -> str:
        """Place of the file that holds this job, which the ranks are started with."""
        return join_uri(self.directory, JOB)

    @property
    def progress(self) -> Path:
        """File of the stage's progress."""
        return self.context.progress_directory / f"{self.phase}.json"

    def place_of(self, path: Path) -> str:
        """Where, for all nodes, a file below the directory is."""
        if not is_remote(self.directory):
            return str(path)
        return join_uri(self.directory, path.relative_to(self.root).as_posix())

    def write(self) -> None:
        """Leave the job where its ranks look for it."""
        write_text(self.uri, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, uri: str) -> Self:
        """The job of a file.

        Raises:
            ValueError: There is none.
            StorageError: The store does not answer.
        """
        return cls.model_validate_json(text_of_job(uri))


class Failure(Frozen):
    """Why a rank ended, for the launcher to tell."""

    rank: int = Field(ge=0)
    """Who failed."""
    time: float
    """When, seconds since 1970: the first failure is the cause, others follow from it."""
    message: str
    """For a person."""
    can_be_fixed: bool
    """Whether it says what to put right (a ValueError, a loss that is not finite)."""


def text_of_job(uri: str) -> str:
    """What a job's file holds.

    Raises:
        ValueError: There is none.
        StorageError: The store does not answer.
    """
    text = read_text(uri)
    if text is None:
        raise ValueError(f"job {uri} does not exist; the launcher writes it before it starts ranks")
    return text


def write_failure(directory: str, *, rank: int, error: BaseException, can_be_fixed: bool) -> None:
    """Leave the reason of a failure in the directory of a job."""
    message = str(error) if can_be_fixed else f"{type(error).__name__}: {error}"
    failure = Failure(rank=rank, time=time.time(), message=message, can_be_fixed=can_be_fixed)
    write_text(join_uri(directory, FAILURES, f"rank_{rank}.json"), failure.model_dump_json())


def first_failure(directory: str) -> Failure | None:
    """The failure to tell: one that can be fixed, else the earliest."""
    failures = join_uri(directory, FAILURES)
    texts = [read_text(join_uri(failures, name)) for name in list_names(failures)]
    found = [Failure.model_validate_json(text) for text in texts if text is not None]
    return min(found, key=lambda f: (not f.can_be_fixed, f.time), default=None)


def forget_outcome(directory: str) -> None:
    """Remove result and failures of an earlier attempt."""
    delete(join_uri(directory, RESULT))
    delete(join_uri(directory, FAILURES))
