"""job: what launcher and ranks leave for each other, on a disk and in a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.ranks.job import Failure, first_failure, remove_earlier_result, write_failure
from components.runtime.context import RunContext
from components.runtime.storage import exists, write_text
from components.train.config import TrainStage
from components.train.job import Job


@pytest.fixture(params=["disk", "store"])
def directory(request: pytest.FixtureRequest, s3: str, tmp_path: Path) -> str:
    return f"{tmp_path}/stage" if request.param == "disk" else "s3://pile/run/stage"


def test_a_job_has_its_place(directory: str, stage: TrainStage) -> None:
    workdir = directory.removesuffix("/stage")
    job = Job(
        phase="finetune",
        stage=stage,
        context=RunContext(workdir=workdir, run_id="r", run_name="test"),
        directory=directory,
        shards="/shards",
        mlflow_run_id="1",
    )
    job.write()
    assert job.uri == f"{directory}/job.json"
    assert exists(job.uri)
    assert job.uri_of(job.root / "deep" / "file") == f"{directory}/deep/file"
    assert job.progress.name == "finetune.json"
    with pytest.raises(ValueError, match=r"other\.json does not exist; the launcher writes it"):
        Job.read(f"{directory}/other.json")


def test_the_failure_to_tell_can_be_fixed_or_came_first(directory: str) -> None:
    def told() -> tuple[int, str] | None:
        failure: Failure | None = first_failure(directory)
        return None if failure is None else (failure.rank, failure.message)

    assert told() is None
    write_failure(directory, rank=1, error=RuntimeError("no peer"))
    write_failure(directory, rank=0, error=RuntimeError("no peer either"))
    assert told() == (1, "RuntimeError: no peer")
    write_failure(directory, rank=2, error=ValueError("batch too large"))
    assert told() == (2, "batch too large")


def test_an_earlier_outcome_is_forgotten(directory: str) -> None:
    remove_earlier_result(directory)
    write_failure(directory, rank=0, error=ValueError("x"))
    write_text(f"{directory}/result.json", "{}")
    write_text(f"{directory}/kept.json", "{}")
    remove_earlier_result(directory)
    assert first_failure(directory) is None
    assert not exists(f"{directory}/result.json")
    assert exists(f"{directory}/kept.json")
