"""worker: one rank without torchrun takes the same path, and tells why it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.ranks.job import first_failure
from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.metric_log import send_unsent_rows
from components.runtime.storage import write_text
from components.runtime.tracking import Tracker
from components.train.config import TrainStage
from components.train.job import MARKER, Job, read_result
from dinov2_core.config.guards import CollapseWatch, Guards
from tests.s3_server import BadLine


def run_worker(job: Job) -> int:
    job.write()
    command = [sys.executable, "-m", "components.train.worker", job.uri]
    return subprocess.run(command, check=False, env=os.environ, timeout=100).returncode


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    return Job(
        stage_name="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id="absent",
    )


def test_input_that_can_be_fixed_is_told_as_it_is(job: Job, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"not one")
    assert run_worker(job.model_copy(update={"starting_weights": str(weights)})) == 2
    failure = first_failure(job.directory)
    assert failure is not None
    assert failure.is_user_error
    assert failure.message.startswith(f"weights {weights} are not a safetensors file")
    assert read_result(job) is None


def test_any_other_error_is_told_with_its_type(job: Job, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shutil.copy(Path(job.shards) / "index.parquet", tmp_path / "shards")
    assert run_worker(job.model_copy(update={"shards": str(tmp_path / "shards")})) == 1
    failure = first_failure(job.directory)
    assert failure is not None
    assert not failure.is_user_error
    assert failure.message.startswith("FileNotFoundError: ")


def test_a_training_without_its_tracking_server_is_finished_and_its_metrics_wait(
    job: Job, context: RunContext
) -> None:
    optimization = job.stage.learning.optimization.model_copy(update={"num_steps": 3})
    learning = job.stage.learning.model_copy(update={"optimization": optimization})
    away = context.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    stage = job.stage.model_copy(update={"learning": learning, "log_every_steps": 2})
    assert run_worker(job.model_copy(update={"context": away, "stage": stage})) == 0
    assert job.is_finished()
    run = Tracker(context).stage("pretrain", key="key")
    send_unsent_rows(str(job.metrics), run, marker=MARKER)
    history = run.client.get_metric_history(run.run_id, "loss/total")
    assert [point.step for point in history] == [0, 2]
    assert not job.metrics.with_name("metrics.jsonl.unsent").exists()


def test_a_diverging_training_ends_with_a_diagnosis_whatever_is_measured(job: Job) -> None:
    learning = job.stage.learning.model_copy(
        update={
            "optimization": job.stage.learning.optimization.model_copy(
                update={"base_learning_rate": 1e30, "num_steps": 30}
            ),
            "guards": Guards(
                max_consecutive_skips=1,
                max_rollbacks=1,
                collapse=CollapseWatch(every_steps=1, num_images=8),
            ),
        }
    )
    stage = job.stage.model_copy(update={"learning": learning})
    assert run_worker(job.model_copy(update={"stage": stage})) == 2
    failure = first_failure(job.directory)
    assert failure is not None
    assert "lower optimization.base_learning_rate" in failure.message
    diagnosis = json.loads(job.diagnosis.read_text())
    assert diagnosis["numbers"]


def test_a_store_that_does_not_answer_is_no_user_error(
    job: Job, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text("s3://pile/shards/index.parquet", "x")
    line = BadLine(s3, faults=["answer 503"] * 999, concerns=lambda method, _: method == "GET")
    with line.open(monkeypatch):
        assert run_worker(job.model_copy(update={"shards": "s3://pile/shards"})) == 1
    failure = first_failure(job.directory)
    assert failure is not None
    assert not failure.is_user_error
    assert "S3 answered 503" in failure.message


def test_images_that_are_not_in_the_store_are_wrong_input(job: Job, s3: str) -> None:
    assert run_worker(job.model_copy(update={"shards": "s3://pile/nothing"})) == 2
    failure = first_failure(job.directory)
    assert failure is not None
    assert "s3://pile/nothing does not exist; run the stage that writes it" in failure.message
