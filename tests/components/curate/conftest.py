"""Fixtures: a store for MLflow, whose tables take seconds to make, and jobs of ranks that embed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.curate.config import CurateSettings
from components.curate.job import EmbeddingJob, ImageSet
from components.curate.stored_images import StoredImages
from components.ranks.config import Topology
from components.runtime.context import RunContext
from tests.components.train.conftest import store

__all__ = ["context", "job_on", "store"]

JobOn = Callable[..., EmbeddingJob]


@pytest.fixture
def context(store: Path, tmp_path: Path) -> RunContext:
    workdir = tmp_path / "work"
    workdir.mkdir()
    shutil.copy(store, workdir / "mlflow.db")
    return RunContext(workdir=str(workdir), run_id="r", run_name="test")


@pytest.fixture
def job_on(tmp_path: Path, photographs: list[bytes]) -> JobOn:
    """A job over a table with that many photographs, some of them the same."""

    def job_on(num_files: int, *, num_ranks: int = 2) -> EmbeddingJob:
        contents = [photographs[number % len(photographs)] for number in range(num_files)]
        table = tmp_path / "images.parquet"
        parquet.write_table(pa.table({"image": contents}), table)
        topology = Topology(processes_per_node=num_ranks, threads_per_process=1, loader_threads=1)
        return EmbeddingJob(
            context=RunContext(workdir=str(tmp_path), run_id="r", run_name="test"),
            directory=str(tmp_path / "stage"),
            mlflow_run_id="",
            settings=CurateSettings(embedding_topology=topology),
            sets=(
                ImageSet(role="source", uris=(str(table),), num_files=num_files),
                ImageSet(role="evaluation", uris=(), num_files=len(StoredImages(()))),
            ),
        )

    return job_on
