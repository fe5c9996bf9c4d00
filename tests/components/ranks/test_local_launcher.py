from __future__ import annotations

import os
from pathlib import Path

import pytest

from components.ranks.job import write_failure
from components.ranks.local_launcher import run_ranks
from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.processes import exclusive_directory
from components.runtime.tracking import Tracker
from components.train.config import Topology, TrainStage
from components.train.job import Job, read_result
from dinov2_core.errors import SettingsError, UserError


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    short = stage.learning.optimization.model_copy(update={"num_steps": 2})
    learning = stage.learning.model_copy(update={"optimization": short})
    topology = Topology(processes_per_node=2, threads_per_process=1, loader_threads=1)
    return Job(
        phase="pretrain",
        stage=stage.model_copy(update={"learning": learning, "topology": topology}),
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id=Tracker(context).stage("pretrain", key="k").run_id,
    )


def test_ranks_of_this_machine_leave_one_result(job: Job) -> None:
    write_failure(job.directory, rank=0, error=SettingsError("of an earlier attempt"))
    with exclusive_directory(job.root) as lock:
        run_ranks(job, lock=lock)
    result = read_result(job)
    assert result is not None
    assert result.step == 2
    assert job.is_finished()
    assert job.teacher.exists()


def test_a_user_error_of_a_rank_is_one_of_the_stage(job: Job, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"not one")
    job = job.model_copy(update={"starting_weights": str(weights)})
    reader, writer = os.pipe()
    with pytest.raises(UserError, match=r"^weights .* are not a safetensors file"):
        run_ranks(job, lock=writer)
    os.close(reader)
    os.close(writer)
