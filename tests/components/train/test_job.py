"""job: what launcher and ranks of a training leave for each other, on a disk and in a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.ranks.job import remove_earlier_result
from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.job import (
    Job,
    Result,
    last_rows,
    places_to_look_at,
    read_result,
    write_result,
)

RESULT = Result(
    is_finished=True, step=3, final_losses={"total": 1.5}, images_per_second=2.0, teacher_sha256="a"
)


@pytest.fixture(params=["disk", "store"])
def job(
    request: pytest.FixtureRequest, s3: str, stage: TrainStage, context: RunContext, tmp_path: Path
) -> Job:
    workdir = str(tmp_path) if request.param == "disk" else "s3://pile/run"
    return Job(
        phase="finetune",
        stage=stage,
        context=context.model_copy(update={"workdir": workdir}),
        directory=f"{workdir}/stage",
        shards="/shards",
        mlflow_run_id="1",
    )


def test_a_job_survives_its_file(job: Job) -> None:
    job.write()
    assert Job.read(job.uri) == job
    assert {place.parent for place in (job.checkpoints, job.teacher, job.metrics)} == {job.root}


def test_what_people_look_at_has_a_place_for_all_nodes(job: Job) -> None:
    places = places_to_look_at(job)
    assert places[job.metrics] == f"{job.directory}/metrics.jsonl"
    assert places[job.progress] == f"{job.context.workdir}/progress/run/finetune.json"


def test_a_result_tells_how_far_a_training_came(job: Job) -> None:
    assert (read_result(job), job.is_finished(), job.progress_description()) == (
        None,
        False,
        "before any step",
    )
    write_result(job, RESULT)
    assert read_result(job) == RESULT
    assert job.is_finished()
    write_result(job, RESULT.model_copy(update={"is_finished": False}))
    assert not job.is_finished()
    assert job.progress_description() == "after step 3, with a checkpoint"
    remove_earlier_result(job.directory)
    assert read_result(job) is None


def test_last_rows_are_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps([step, {"loss": step}]) + "\n" for step in range(5)))
    assert last_rows(path, 2) == [{"loss": 3}, {"loss": 4}]
    assert len(last_rows(path, 9)) == 5
