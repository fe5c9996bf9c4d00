"""Files between a launcher and the ranks of a stage: their job, their result, their failures."""

from __future__ import annotations

import time
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, ValidationError

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
from dinov2_core.errors import InputError, UserError, message_of

JOB, RESULT, FAILURES = "job.json", "result.json", "failures"
"""Names in the directory of a stage."""


class RanksJob(Frozen):
    """Everything that a rank needs; each stage that has ranks adds what they work on."""

    worker: ClassVar[str]
    """Module of ours that is run as one rank."""
    work: ClassVar[str]
    """Name of the ranks' task in progress reports, such as `training`."""

    stage_name: str
    """Stage that the ranks belong to."""
    context: RunContext
    """What all stages of the pipeline run share."""
    directory: str
    """Directory of the stage: a path that all nodes share, or an s3:// URI."""
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
    def progress_description(self) -> str:
        """Where the ranks were stopped, such as `after step 7, with a checkpoint`."""

    @property
    def root(self) -> Path:
        """Directory of the stage on this node."""
        return local_path(self.directory)

    @property
    def uri(self) -> str:
        """Path or URI of the file that holds this job, which the ranks are started with."""
        return join_uri(self.directory, JOB)

    @property
    def progress(self) -> Path:
        """File of the stage's progress."""
        return self.context.progress_directory / f"{self.stage_name}.json"

    def uri_of(self, path: Path) -> str:
        """Path or URI, for all nodes, of a file below the directory."""
        if not is_remote(self.directory):
            return str(path)
        return join_uri(self.directory, path.relative_to(self.root).as_posix())

    def write(self) -> None:
        """Write the file that the ranks read."""
        write_text(self.uri, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, uri: str) -> Self:
        """The job of a file.

        Raises:
            InputError: There is none, or one of another version.
            StoreRefused, StoreUnavailable: The store refuses, or does not answer.
        """
        try:
            return cls.model_validate_json(text_of_job(uri))
        except ValidationError as error:
            raise InputError(f"job {uri} was written by another version: {error}") from error


class Failure(Frozen):
    """Why a rank ended, for the launcher."""

    rank: int = Field(ge=0)
    """Rank that failed."""
    time: float
    """When, seconds since 1970: the first failure is the cause, others follow from it."""
    message: str
    """For the user."""
    is_user_error: bool
    """Whether the user must change something, as the message says."""


def text_of_job(uri: str) -> str:
    """What a job's file holds.

    Raises:
        InputError: There is none.
        StoreRefused, StoreUnavailable: The store refuses, or does not answer.
    """
    text = read_text(uri)
    if text is None:
        raise InputError(f"job {uri} does not exist; the launcher writes it before it starts ranks")
    return text


def write_failure(directory: str, *, rank: int, error: BaseException) -> None:
    """Leave the reason of a failure in the directory of a job."""
    failure = Failure(
        rank=rank,
        time=time.time(),
        message=message_of(error),
        is_user_error=isinstance(error, UserError),
    )
    write_text(join_uri(directory, FAILURES, f"rank_{rank}.json"), failure.model_dump_json())


def first_failure(directory: str) -> Failure | None:
    """The failure that explains the others: one of the user's, else the earliest."""
    failures = join_uri(directory, FAILURES)
    texts = [read_text(join_uri(failures, name)) for name in list_names(failures)]
    found = [Failure.model_validate_json(text) for text in texts if text is not None]
    return min(found, key=lambda f: (not f.is_user_error, f.time), default=None)


def remove_earlier_result(directory: str) -> None:
    """Remove result and failures of an earlier attempt."""
    delete(join_uri(directory, RESULT))
    delete(join_uri(directory, FAILURES))
