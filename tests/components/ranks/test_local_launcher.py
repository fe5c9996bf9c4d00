from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from components.ranks.job import write_failure
from components.ranks.local_launcher import run_ranks
from components.runtime.context import RunContext
from components.runtime.lease import leased
from components.runtime.manifests import DatasetManifest
from components.runtime.processes import exclusive_directory
from components.runtime.storage import write_text
from components.runtime.tracking import Tracker
from components.train.config import Topology, TrainStage
from components.train.job import Job, read_result
from dinov2_core.errors import LeaseLost, SettingsError, UserError


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    short = stage.learning.optimization.model_copy(update={"num_steps": 2})
    learning = stage.learning.model_copy(update={"optimization": short})
    topology = Topology(processes_per_node=2, threads_per_process=1, loader_threads=1)
    return Job(
        stage_name="pretrain",
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


class SleepingJob(Job):
    worker: ClassVar[str] = "tests.components.ranks.sleeper"


def test_ranks_end_with_a_stage_that_lost_its_lease(
    s3: str, stage: TrainStage, tmp_path: Path
) -> None:
    job = SleepingJob(
        stage_name="pretrain",
        stage=stage,
        context=RunContext(workdir=str(tmp_path), run_name="test"),
        directory=str(tmp_path / "stage"),
        shards="",
        mlflow_run_id="",
    )
    uri = "s3://pile/stages/pretrain/0/lease.json"

    def take_over() -> None:
        while not (job.root / "pid").exists():
            time.sleep(0.05)
        lease = {"owner": "run b", "holder": "other", "until": time.time() + 100}
        write_text(uri, json.dumps(lease))

    thread = threading.Thread(target=take_over, daemon=True)
    lost = pytest.raises(LeaseLost, match="was taken over by run b")
    with exclusive_directory(job.root) as lock, lost, leased(uri, owner="run a", seconds=2):
        thread.start()
        run_ranks(job, lock=lock)
    rank = Path(f"/proc/{(job.root / 'pid').read_text()}")
    deadline = time.monotonic() + 20
    while rank.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not rank.exists()
