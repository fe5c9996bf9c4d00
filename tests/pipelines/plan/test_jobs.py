"""plan_jobs: the job that is planned is the one that the launcher makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.ranks.cluster_job import PASSED_ON, training_of
from components.train.job import Job
from dinov2_core.errors import SettingsError
from k8s.launchers import RUNTIME, Processes, read_launch
from k8s.training import HASH_ANNOTATION
from k8s.trainjob import trainjob
from pipelines.cluster.submit import cluster_context, target_of
from pipelines.graph.placement import launcher_of
from pipelines.plan.jobs import RUN, WORK, planned_job
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.k8s.schemas import schema_problems
from tests.pipelines.specs import small_values, write_spec

IMAGE = f"registry.example/dinopipe@sha256:{'a' * 64}"
SET_BY_STEP = (*PASSED_ON, "MLFLOW_RUN_ID")
TRACKING = "https://mlflow.example"


def a_spec(folder: Path, **changes: object) -> PipelineSpec:
    values = small_values(
        "s3://bucket/pile",
        placement={"launcher": {"kind": "trainjob"}, "environment": {"NCCL_DEBUG": "INFO"}},
        tracking={"uri": TRACKING},
        **changes,
    )
    return load_spec(write_spec({**values, "image": IMAGE}, folder / "spec.yaml"))


def test_the_planned_job_is_the_launchers_but_for_what_the_step_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "of-this-shell")
    spec = a_spec(tmp_path)
    target = target_of(spec, workdir="s3://bucket/runs")
    text = launcher_of(
        spec.placement, resources=spec.resources.finetune, image=IMAGE, volume=target.volume
    )
    launch = read_launch(text)
    assert not isinstance(launch, Processes)
    job = Job(
        stage_name="finetune",
        stage=spec.finetune_stage,
        context=cluster_context(spec, workdir=target.workdir).model_copy(update={"run_id": RUN}),
        directory=f"s3://bucket/runs/stages/finetune/{WORK}",
        shards="s3://bucket/runs/shards",
        mlflow_run_id="c0ffee",
    )
    made = trainjob(training_of(job, pods=launch.pods, owner=None), runtime=RUNTIME)
    planned = planned_job("finetune", spec, target)
    assert planned is not None
    del made["metadata"]["annotations"][HASH_ANNOTATION]
    made["metadata"] = {key: value for key, value in made["metadata"].items() if value}
    assert without_step_variables(made) == planned
    assert "of-this-shell" in str(made)
    assert "c0ffee" in str(made)


def without_step_variables(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_step_variables(item) for key, item in value.items()}
    if isinstance(value, list):
        kept = [
            item
            for item in value
            if not (isinstance(item, dict) and item.get("name") in SET_BY_STEP)
        ]
        return [without_step_variables(item) for item in kept]
    return value


def test_a_planned_trainjob_is_right_before_there_is_a_run(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    planned = planned_job("pretrain", spec, target_of(spec))
    assert planned is not None
    assert schema_problems(planned) == []
    assert planned["spec"]["trainer"]["command"][-1].endswith("/stages/pretrain/WORK/job.json")


def test_ranks_that_embed_have_a_job_and_a_stage_that_embeds_itself_has_none(
    tmp_path: Path,
) -> None:
    alone = a_spec(tmp_path)
    assert planned_job("curate", alone, target_of(alone)) is None
    spec = a_spec(tmp_path, curate__embedding_topology={"num_nodes": 3})
    planned = planned_job("curate", spec, target_of(spec))
    assert planned is not None
    assert planned["spec"]["trainer"]["numNodes"] == 3
    assert "components.curate.worker" in planned["spec"]["trainer"]["command"]


def test_processes_need_no_job(tmp_path: Path) -> None:
    spec = load_spec(write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml"))
    assert planned_job("pretrain", spec, target_of(spec)) is None


def test_what_the_launcher_refuses_is_refused_here(tmp_path: Path) -> None:
    spec = a_spec(tmp_path, tracking__uri="")
    with pytest.raises(SettingsError, match=r"set tracking\.uri to an MLflow server"):
        planned_job("pretrain", spec, target_of(spec, workdir="s3://bucket/runs"))
