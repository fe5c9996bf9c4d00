"""What the launcher tells the ranks, and what they tell it: small JSON files in one place."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import Field

from components.runtime.context import RunContext
from components.runtime.storage import (
    delete,
    is_remote,
    joined,
    local_path,
    names,
    read_text,
    write_text,
)
from components.train.config import TrainStage
from dinov2_core.config import Frozen

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL): stopped by SIGTERM with a checkpoint written; start again to go on."""

CHECKPOINTS = "checkpoints"
"""Name of their directory in that of the stage."""

Phase = Literal["pretrain", "finetune"]


class Job(Frozen):
    """Everything that a rank needs."""

    phase: Phase
    """Stage that trains."""
    stage: TrainStage
    """What is learned and where."""
    context: RunContext
    """Of the pipeline run."""
    directory: str
    """Place of the stage: a directory that all nodes share, or an s3:// URI."""
    shards: str
    """Place of the images."""
    starting_weights: str = ""
    """Place of a teacher's file to start from; empty starts from random weights."""
    mlflow_run_id: str
    """Run that rank 0 logs to."""

    @property
    def root(self) -> Path:
        """Directory of the stage on this node."""
        return local_path(self.directory)

    @property
    def uri(self) -> str:
        """Place of the file that holds this job, which the ranks are started with."""
        return joined(self.directory, "job.json")

    @property
    def images(self) -> Path:
        """Directory of the images on this node, once they were fetched."""
        return local_path(self.shards)

    @property
    def progress(self) -> Path:
        """File of the phase's progress."""
        return self.context.progress_directory / f"{self.phase}.json"

    @property
    def result(self) -> str:
        """Place of what rank 0 leaves."""
        return joined(self.directory, "result.json")

    @property
    def failures(self) -> str:
        """Place of what ranks that fail leave."""
        return joined(self.directory, "failures")

    def place_of(self, path: Path) -> str:
        """Where, for all nodes, a file below the directory is."""
        if not is_remote(self.directory):
            return str(path)
        return joined(self.directory, path.relative_to(self.root).as_posix())

    @property
    def checkpoints(self) -> Path:
        """Directory of the resumable checkpoints."""
        return self.root / CHECKPOINTS

    @property
    def teacher(self) -> Path:
        """File of the exported teacher."""
        return self.root / "teacher.safetensors"

    @property
    def metrics(self) -> Path:
        """File with one line of metrics per step."""
        return self.root / "metrics.jsonl"

    @property
    def starting_report(self) -> Path:
        """File that says what became of the starting weights, a summary on its first line."""
        return self.root / "starting_weights.txt"

    @property
    def health(self) -> Path:
        """Directory of the health page and its figures."""
        return self.root / "health"

    @property
    def trace(self) -> Path:
        """File of the profiler's trace."""
        return self.root / "trace.json.gz"

    @property
    def diagnosis(self) -> Path:
        """File that says which numbers of which images were not finite."""
        return self.root / "diagnosis.json"


class Result(Frozen):
    """What rank 0 leaves when it ends in good order."""

    is_finished: bool
    """Whether all steps were taken; otherwise it was told to stop."""
    step: int = Field(ge=0)
    """Optimizer steps taken."""
    final_losses: dict[str, float]
    """Of the last step."""
    images_per_second: float
    """Mean over the last steps, over all ranks."""
    teacher_sha256: str
    """Digest of the exported teacher; empty unless finished."""


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


def places_to_look_at(job: Job) -> dict[Path, str]:
    """What the main rank keeps on its node for people to look at, and where all nodes see it."""
    kept = (job.metrics, job.health, job.starting_report, job.trace)
    return {path: job.place_of(path) for path in kept} | {
        job.progress: job.context.uri_of(job.progress)
    }


def write_job(job: Job) -> None:
    """Leave a job where its ranks look for it."""
    write_text(job.uri, job.model_dump_json(indent=2) + "\n")


def read_job(uri: str) -> Job:
    """The job of a file.

    Raises:
        ValueError: There is none.
        StorageError: The store does not answer.
    """
    text = read_text(uri)
    if text is None:
        raise ValueError(f"job {uri} does not exist; the launcher writes it before it starts ranks")
    return Job.model_validate_json(text)


def write_result(job: Job, result: Result) -> None:
    """Leave the result."""
    write_text(job.result, result.model_dump_json(indent=2) + "\n")


def read_result(job: Job) -> Result | None:
    """What rank 0 left; None before that."""
    text = read_text(job.result)
    return None if text is None else Result.model_validate_json(text)


def write_failure(job: Job, *, rank: int, error: BaseException, can_be_fixed: bool) -> None:
    """Leave the reason of a failure."""
    message = str(error) if can_be_fixed else f"{type(error).__name__}: {error}"
    failure = Failure(rank=rank, time=time.time(), message=message, can_be_fixed=can_be_fixed)
    write_text(joined(job.failures, f"rank_{rank}.json"), failure.model_dump_json())


def first_failure(job: Job) -> Failure | None:
    """The failure to tell: one that can be fixed, else the earliest."""
    texts = [read_text(joined(job.failures, name)) for name in names(job.failures)]
    failures = [Failure.model_validate_json(text) for text in texts if text is not None]
    return min(failures, key=lambda f: (not f.can_be_fixed, f.time), default=None)


def last_rows(metrics: Path, count: int) -> list[dict[str, float]]:
    """Metrics of the last steps, oldest first; fewer where there are fewer."""
    with metrics.open(encoding="utf-8") as file:
        lines = deque(file, maxlen=count)
    return [json.loads(line)[1] for line in lines]


def forget_outcome(job: Job) -> None:
    """Remove result and failures of an earlier attempt."""
    delete(job.result)
    delete(job.failures)
