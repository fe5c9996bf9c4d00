from __future__ import annotations

from pathlib import Path

import pytest

from components.ranks.cluster_job import own_pod, training_of
from components.runtime.context import RunContext
from components.train.config import Topology, TrainStage
from components.train.job import Job
from dinov2_core.errors import SettingsError
from k8s.training import Owner
from tests.golden.manifests import BARE, FULL


@pytest.fixture
def job(stage: TrainStage, tmp_path: Path) -> Job:
    return Job(
        stage_name="pretrain",
        stage=stage.model_copy(update={"topology": Topology(num_nodes=2, processes_per_node=4)}),
        context=RunContext(workdir=str(tmp_path), run_id="run-1", run_name="vits14"),
        directory=str(tmp_path / "stage"),
        shards="shards",
        mlflow_run_id="m1",
    )


def test_ranks_are_those_of_the_topology(job: Job) -> None:
    training = training_of(job, pods=BARE, owner=None)
    assert (training.num_nodes, training.processes_per_node) == (2, 4)


def test_other_settings_make_another_training_and_another_mlflow_run_does_not(job: Job) -> None:
    first = training_of(job, pods=BARE, owner=None)
    rerun = training_of(job.model_copy(update={"mlflow_run_id": "m2"}), pods=BARE, owner=None)
    other = training_of(job.model_copy(update={"shards": "others"}), pods=BARE, owner=None)
    assert first.content_sha256 == rerun.content_sha256
    assert first.content_sha256 != other.content_sha256
    assert rerun.passing_environment == {"MLFLOW_RUN_ID": "m2"}


def test_a_pod_owns_jobs_of_its_own_namespace_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POD_NAME", "p")
    monkeypatch.setenv("POD_UID", "u")
    assert own_pod(BARE) == Owner(name="p", uid="u")
    monkeypatch.setenv("POD_NAMESPACE", "elsewhere")
    assert own_pod(BARE) is None
    assert "in namespace elsewhere and its training in team" in caplog.text
    monkeypatch.delenv("POD_NAMESPACE")
    monkeypatch.delenv("POD_UID")
    assert own_pod(BARE) is None


def test_an_address_with_a_password_stays_out_of_manifests(job: Job) -> None:
    context = job.context.model_copy(update={"tracking_uri": "https://me:word@mlflow"})
    with pytest.raises(SettingsError, match="tracking.uri holds a password") as refused:
        training_of(job.model_copy(update={"context": context}), pods=BARE, owner=None)
    assert "word@" not in str(refused.value)


def test_pods_without_a_shared_directory_need_a_tracking_server(job: Job) -> None:
    context = job.context.model_copy(update={"workdir": "s3://bucket/runs"})
    remote = job.model_copy(update={"context": context, "directory": "s3://bucket/runs/stage"})
    with pytest.raises(SettingsError, match="set tracking.uri to an MLflow server"):
        training_of(remote, pods=BARE, owner=None)
    served = context.model_copy(update={"tracking_uri": "https://mlflow.example"})
    training = training_of(remote.model_copy(update={"context": served}), pods=BARE, owner=None)
    assert training.command[-1] == "s3://bucket/runs/stage/job.json"


def test_the_store_s_address_is_passed_on_unless_a_secret_holds_it(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    assert (
        training_of(job, pods=BARE, owner=None).environment["AWS_ENDPOINT_URL"]
        == "http://store:9000"
    )
    assert "planted" not in str(training_of(job, pods=FULL, owner=None))
    keys = FULL.placement.secrets[0].model_copy(update={"keys": ("AWS_ENDPOINT_URL",)})
    placement = FULL.placement.model_copy(update={"secrets": (keys,)})
    pods = FULL.model_copy(update={"placement": placement})
    assert "AWS_ENDPOINT_URL" not in training_of(job, pods=pods, owner=None).environment
