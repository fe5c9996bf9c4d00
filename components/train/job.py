"""Files by which launcher and ranks of a training hand over settings and results."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from components.ranks.config import Topology
from components.ranks.job import RESULT, RanksJob
from components.runtime.storage import join_uri, local_path, read_text, write_text
from components.train.config import TrainStage
from dinov2_core.config.frozen import Frozen

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
"""Names in the directory of the stage."""

MARKER = "schedule/learning_rate"
"""Metric of every row of metrics, by which the last step that MLflow has is found."""
StageName = Literal["pretrain", "finetune"]


class Job(RanksJob):
    """Everything that a rank of a training needs."""

    worker: ClassVar[str] = "components.train.worker"
    work: ClassVar[str] = "training"

    stage_name: StageName
    """Stage that trains."""
    stage: TrainStage
    """Settings of the stage."""
    shards: str
    """URI of the images."""
    starting_weights: str = ""
    """URI of a teacher's file to start from; empty starts from random weights."""

    @property
    def topology(self) -> Topology:
        """How many ranks train, and where."""
        return self.stage.topology

    def is_finished(self) -> bool:
        """Whether all steps were taken and the teacher was exported."""
        result = read_result(self)
        return result is not None and result.is_finished

    def progress_description(self) -> str:
        """The last step, which has a checkpoint."""
        result = read_result(self)
        return f"after step {result.step}, with a checkpoint" if result else "before any step"

    @property
    def images(self) -> Path:
        """Directory of the images on this node, once they were downloaded."""
        return local_path(self.shards)

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
        """File of the metrics, see `MetricLog`."""
        return self.root / METRICS

    @property
    def weights_report(self) -> Path:
        """File that lists which starting weights were loaded, with a summary on its first line."""
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
    """What rank 0 leaves when it ends without an error."""

    is_finished: bool
    """Whether all steps were taken; otherwise the ranks were asked to stop."""
    step: int = Field(ge=0)
    """Optimizer steps taken."""
    final_losses: dict[str, float]
    """Of the last step."""
    images_per_second: float
    """Mean over the last steps, over all ranks."""
    teacher_sha256: str
    """Digest of the exported teacher; empty unless finished."""


def report_uris(job: Job) -> dict[Path, str]:
    """Files that the main rank reports to while it trains, and their URIs."""
    kept = (job.metrics, job.health, job.weights_report, job.trace)
    return {path: job.uri_of(path) for path in kept} | {
        job.progress: job.context.uri_of(job.progress)
    }


def write_result(job: Job, result: Result) -> None:
    """Leave the result."""
    write_text(join_uri(job.directory, RESULT), result.model_dump_json(indent=2) + "\n")


def read_result(job: Job) -> Result | None:
    """What rank 0 left; None before that."""
    text = read_text(join_uri(job.directory, RESULT))
    return None if text is None else Result.model_validate_json(text)
