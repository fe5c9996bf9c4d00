"""What the launcher tells the ranks, and what they tell it: small JSON files in one directory."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import Field

from components.runtime.context import RunContext
from components.runtime.manifests import write_atomically
from components.train.config import TrainStage
from dinov2_core.config import Frozen

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL): stopped by SIGTERM with a checkpoint written; start again to go on."""

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
    """Directory of the stage, on a file system that all ranks share."""
    shards: str
    """Directory of the images."""
    starting_weights: str = ""
    """File of a teacher to start from; empty starts from random weights."""
    mlflow_run_id: str
    """Run that rank 0 logs to."""

    @property
    def root(self) -> Path:
        """Directory of the stage."""
        return Path(self.directory)

    @property
    def checkpoints(self) -> Path:
        """Directory of the resumable checkpoints."""
        return self.root / "checkpoints"

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

    @property
    def file(self) -> Path:
        """File that holds this job."""
        return self.root / "job.json"


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


def result_file(directory: Path) -> Path:
    """Where rank 0 writes its result."""
    return directory / "result.json"


def write_failure(directory: Path, *, rank: int, error: BaseException, can_be_fixed: bool) -> None:
    """Leave the reason of a failure."""
    message = str(error) if can_be_fixed else f"{type(error).__name__}: {error}"
    failure = Failure(rank=rank, time=time.time(), message=message, can_be_fixed=can_be_fixed)
    write_atomically(directory / "failures" / f"rank_{rank}.json", failure.model_dump_json())


def first_failure(directory: Path) -> Failure | None:
    """The failure to tell: one that can be fixed, else the earliest."""
    failures = [
        Failure.model_validate_json(path.read_text(encoding="utf-8"))
        for path in directory.glob("failures/rank_*.json")
    ]
    return min(failures, key=lambda f: (not f.can_be_fixed, f.time), default=None)


def last_rows(metrics: Path, count: int) -> list[dict[str, float]]:
    """Metrics of the last steps, oldest first; fewer where there are fewer."""
    with metrics.open(encoding="utf-8") as file:
        lines = deque(file, maxlen=count)
    return [json.loads(line)[1] for line in lines]


def forget_outcome(directory: Path) -> None:
    """Remove result and failures of an earlier attempt."""
    for path in (result_file(directory), *directory.glob("failures/rank_*.json")):
        path.unlink(missing_ok=True)
