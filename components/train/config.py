"""Settings of the training stages: what is learned and on how many processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from components.local_paths import LocalPath
from components.ranks.config import Topology as Topology
from dinov2_core.config.frozen import Frozen
from dinov2_core.config.training import TrainingConfig

WEIGHT_SOURCES = {
    "s3://BUCKET/KEY": r"s3://[^/]+/.*[^/]",
    "timm:NAME.TAG": r"timm:[\w-]+\.[\w.-]+",
    "models:/NAME@ALIAS": r"models:/[^/@]+@[^/@]+",
    "models:/NAME/VERSION": r"models:/[^/@]+/\d+",
}
"""Starting weights that are not a path, and how each is written."""


def is_weights_file(source: str) -> bool:
    """Whether starting weights are named by a path on this machine."""
    return bool(source) and not source.startswith(("s3://", "timm:", "models:/"))


def weights_file(source: str) -> Path:
    """The file of starting weights that a path names: itself, or in a folder of Hugging Face."""
    path = Path(source)
    return path / "model.safetensors" if path.is_dir() else path


class Probe(Frozen):
    """A small labelled set on which the teacher is measured while it trains.

    It changes nothing that is learned.
    """

    train: LocalPath
    """Labelled images: a folder or s3:// prefix with one folder per class, or a Parquet file or
    object with the columns image and label."""
    test: LocalPath = ""
    """Images to classify, of the same form; empty holds out every fifth image of `train`."""
    every_steps: int = Field(1000, ge=1)
    """Steps between two measurements; the last step is measured as well."""
    max_train_images: int = Field(1000, ge=2)
    """Labelled images used, evenly chosen."""
    max_test_images: int = Field(500, ge=1)
    """Images classified, evenly chosen."""
    num_neighbours: int = Field(10, ge=1)
    """Neighbours that vote, all images where there are fewer; arXiv:2304.07193 reports the best
    of 10, 20, 100 and 200."""
    min_top1: float = Field(0.0, ge=0, le=1)
    """Least share classified correctly; less indicates collapse, with the consequence that
    learning.guards.collapse.action names. 0 never warns."""


class TrainStage(Frozen):
    """One training: pretraining, or training on at a higher resolution."""

    learning: TrainingConfig
    """What is learned."""
    topology: Topology = Topology()
    """Processes that train together."""
    initial_weights: LocalPath = ""
    """Teacher to start from: a file (a DINOv2 release or checkpoint, timm's or Hugging Face's
    safetensors, a teacher of this program), a folder with a model.safetensors, an s3:// path of a
    file, timm:NAME.TAG, or models:/NAME@ALIAS of the run's tracking store. Empty starts from the
    given checkpoint manifest, or from random weights where there is none."""
    probe: Probe | None = None
    """Measures the teacher now and then; not at all when null."""
    log_every_steps: int | None = Field(None, ge=1, exclude_if=lambda steps: steps is None)
    """Steps between two rows of metrics. A row holds the numbers of its own step, not means; steps
    that write a checkpoint, measure the teacher, or are skipped or taken again have a row as well.
    Null is every step up to 20,000 steps, and about 10,000 rows in a longer training (every 62nd of
    625,000 steps). It changes nothing that is learned."""

    @property
    def metric_interval_steps(self) -> int:
        """log_every_steps, or what follows from the number of steps."""
        return self.log_every_steps or max(1, self.learning.optimization.num_steps // 10_000)

    @field_validator("initial_weights")
    @classmethod
    def _source_is_known(cls, source: str) -> str:
        has_scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) is not None
        if has_scheme and not any(re.fullmatch(form, source) for form in WEIGHT_SOURCES.values()):
            raise ValueError(
                f"{source} is neither a path nor of the form {', '.join(WEIGHT_SOURCES)}; "
                "download other addresses first and name the file"
            )
        return source

    @model_validator(mode="after")
    def _warmup_has_weights(self) -> Self:
        if self.learning.head_warmup is not None and not self.initial_weights:
            raise ValueError(
                "learning.head_warmup freezes the backbone, which is random without starting "
                "weights; set initial_weights, or leave head_warmup out"
            )
        return self

    @model_validator(mode="after")
    def _world_divides_batch(self) -> Self:
        batch, world = self.learning.optimization.global_batch_size, self.topology.world_size
        if batch % world:
            raise ValueError(
                f"learning.optimization.global_batch_size {batch} is not divisible by {world} "
                f"ranks (topology.num_nodes {self.topology.num_nodes} x "
                f"topology.processes_per_node {self.topology.processes_per_node}); "
                f"choose a multiple of {world}"
            )
        parts = self.learning.optimization.accumulation_steps
        if batch % (world * parts):
            raise ValueError(
                f"learning.optimization.global_batch_size {batch} is not divisible by {world} "
                f"ranks x learning.optimization.accumulation_steps {parts}; choose a multiple of "
                f"{world * parts}, or fewer parts"
            )
        return self
