"""The jobs that the stages of a spec will start on a cluster, before there is a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from components.curate.job import EmbeddingJob
from components.ranks.cluster_job import PASSED_ON, training_of
from components.ranks.job import RanksJob
from components.runtime.uris import join_uri
from components.train.job import Job
from k8s.launchers import Processes, read_launch
from k8s.training import Training
from k8s.trainjob import trainjob
from pipelines.cluster.submit import Target, cluster_context
from pipelines.graph.placement import launcher_of
from pipelines.spec.pipeline_spec import PipelineSpec

RUN, WORK = "RUN", "WORK"
"""Placeholders of a run's id, and of a stage's directory, whose name follows from its inputs."""
RanksPhase = Literal["curate", "pretrain", "finetune"]
"""A stage that may start a job."""
PHASES: tuple[RanksPhase, ...] = get_args(RanksPhase)

Object = dict[str, Any]


def planned_job(phase: RanksPhase, spec: PipelineSpec, target: Target) -> Object | None:
    """Manifest of a stage's job; None where its ranks are processes of the stage's own pod.

    The digest of the job's content is left out: it covers what is not known before the run.

    Args:
        phase: Stage that has ranks.
        spec: Checked spec.
        target: Work directory, volume and account on the cluster.

    Raises:
        SettingsError: The spec's tracking server cannot be named in a manifest, or is missing.
    """
    text = launcher_of(
        spec.placement,
        resources=getattr(spec.resources, phase),
        image=spec.image,
        volume=target.volume,
    )
    launch = read_launch(text)
    has_ranks = phase != "curate" or spec.curate.embeds_on_ranks(on_cluster=True)
    if isinstance(launch, Processes) or not has_ranks:
        return None
    job = _ranks_of(phase, spec, target)
    training = _without_step_variables(training_of(job, pods=launch.pods, owner=None))
    manifest = trainjob(training, runtime=launch.runtime)
    del manifest["metadata"]["annotations"]
    return manifest


def _ranks_of(phase: RanksPhase, spec: PipelineSpec, target: Target) -> RanksJob:
    context = cluster_context(spec, workdir=target.workdir).model_copy(update={"run_id": RUN})
    directory = join_uri(target.workdir, "stages", phase, WORK)
    if phase == "curate":
        return EmbeddingJob(
            settings=spec.curate, sets=(), context=context, directory=directory, mlflow_run_id=""
        )
    return Job(
        stage_name=phase,
        stage=spec.pretrain_stage if phase == "pretrain" else spec.finetune_stage,
        context=context,
        directory=directory,
        shards="",
        mlflow_run_id="",
    )


def _without_step_variables(training: Training) -> Training:
    """Without the variables that the step takes from its own environment."""
    kept = {key: value for key, value in training.environment.items() if key not in PASSED_ON}
    return replace(training, environment=kept, passing_environment={})
