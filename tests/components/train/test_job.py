"""job: what launcher and ranks leave for each other, on a disk and in a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.job import (
    Job,
    Result,
    first_failure,
    forget_outcome,
    last_rows,
    places_to_look_at,
    read_job,
    read_result,
    write_failure,
    write_job,
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
    write_job(job)
    assert job.uri == f"{job.directory}/job.json"
    assert read_job(job.uri) == job
    assert {place.parent for place in (job.checkpoints, job.teacher, job.metrics)} == {job.root}
    with pytest.raises(ValueError, match=r"other\.json does not exist; the launcher writes it"):
        read_job(f"{job.directory}/other.json")


def test_what_people_look_at_has_a_place_for_all_nodes(job: Job) -> None:
    places = places_to_look_at(job)
    assert places[job.metrics] == f"{job.directory}/metrics.jsonl"
    assert places[job.progress] == f"{job.context.workdir}/progress/run/finetune.json"


def test_the_failure_to_tell_can_be_fixed_or_came_first(job: Job) -> None:
    assert first_failure(job) is None
    write_failure(job, rank=1, error=RuntimeError("no peer"), can_be_fixed=False)
    write_failure(job, rank=0, error=RuntimeError("no peer either"), can_be_fixed=False)
    failure = first_failure(job)
    assert failure is not None
    assert (failure.rank, failure.message) == (1, "RuntimeError: no peer")
    write_failure(job, rank=2, error=ValueError("batch too large"), can_be_fixed=True)
    failure = first_failure(job)
    assert failure is not None
    assert (failure.rank, failure.message) == (2, "batch too large")


def test_an_earlier_outcome_is_forgotten(job: Job) -> None:
    forget_outcome(job)
    write_failure(job, rank=0, error=ValueError("x"), can_be_fixed=True)
    write_result(job, RESULT)
    assert read_result(job) == RESULT
    forget_outcome(job)
    assert first_failure(job) is None
    assert read_result(job) is None


def test_last_rows_are_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps([step, {"loss": step}]) + "\n" for step in range(5)))
    assert last_rows(path, 2) == [{"loss": 3}, {"loss": 4}]
    assert len(last_rows(path, 9)) == 5
