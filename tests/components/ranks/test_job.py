"""job: the files between launcher and ranks, on a disk and in a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.ranks.job import Failure, first_failure, remove_earlier_result, write_failure
from components.runtime.context import RunContext
from components.runtime.storage import exists, write_text
from components.train.config import TrainStage
from components.train.job import Job
from dinov2_core.errors import InputError, SettingsError, TrackingUnavailable


@pytest.fixture(params=["disk", "store"])
def directory(request: pytest.FixtureRequest, s3: str, tmp_path: Path) -> str:
    return f"{tmp_path}/stage" if request.param == "disk" else "s3://pile/run/stage"


def test_a_job_has_a_file_in_its_directory(directory: str, stage: TrainStage) -> None:
    workdir = directory.removesuffix("/stage")
    job = Job(
        stage_name="finetune",
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
    with pytest.raises(InputError, match=r"other\.json does not exist; the launcher writes it"):
        Job.read(f"{directory}/other.json")


def test_the_first_failure_is_a_user_error_or_the_earliest(directory: str) -> None:
    def first() -> tuple[int, str] | None:
        failure: Failure | None = first_failure(directory)
        return None if failure is None else (failure.rank, failure.message)

    assert first() is None
    write_failure(directory, rank=1, error=RuntimeError("no peer"))
    write_failure(directory, rank=0, error=RuntimeError("no peer either"))
    assert first() == (1, "RuntimeError: no peer")
    write_failure(directory, rank=2, error=SettingsError("batch too large"))
    assert first() == (2, "batch too large")


def test_a_transient_fault_is_no_user_error_whatever_its_message(directory: str) -> None:
    write_failure(directory, rank=0, error=TrackingUnavailable("MLflow does not answer"))
    failure = first_failure(directory)
    assert failure is not None
    assert (failure.is_user_error, failure.message) == (False, "MLflow does not answer")


def test_a_job_of_another_version_is_an_input_error(directory: str) -> None:
    write_text(f"{directory}/job.json", '{"unknown": 1}')
    with pytest.raises(InputError, match="was written by another version"):
        Job.read(f"{directory}/job.json")


def test_an_earlier_result_is_removed(directory: str) -> None:
    remove_earlier_result(directory)
    write_failure(directory, rank=0, error=SettingsError("x"))
    write_text(f"{directory}/result.json", "{}")
    write_text(f"{directory}/kept.json", "{}")
    remove_earlier_result(directory)
    assert first_failure(directory) is None
    assert not exists(f"{directory}/result.json")
    assert exists(f"{directory}/kept.json")
