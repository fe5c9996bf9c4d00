"""The jobs that the stages of a spec will start on a cluster, before there is a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from components.curate.job import EmbeddingJob
from components.ranks.cluster_job import PASSED_ON, rendered, training_of
from components.ranks.job import RanksJob
from components.runtime.uris import join_uri
from components.train.job import Job
from k8s.job_kind import JobKind
from k8s.launchers import Processes, read_launch
from k8s.training import Training
from pipelines.cluster.submit import Target, cluster_context
from pipelines.graph.placement import launcher_of
from pipelines.spec.pipeline_spec import PipelineSpec

RUN, WORK = "RUN", "WORK"
"""Stand for what is known once a run has begun: its identity, and that of what a stage reads."""
SET_BY_STEP = (*PASSED_ON, "MLFLOW_RUN_ID")
"""Variables that the step adds out of its own environment when it starts the job."""
RanksPhase = Literal["curate", "pretrain", "finetune"]
"""A stage that may start one."""
PHASES: tuple[RanksPhase, ...] = get_args(RanksPhase)

Object = dict[str, Any]


def planned_job(
    phase: RanksPhase, spec: PipelineSpec, target: Target, *, run: str = RUN, work: str = WORK
) -> tuple[JobKind, Object] | None:
    """Kind and manifest of a stage's job; None where its ranks are processes of its own pod.

    The digest of the job's content is left out: it covers what is not known before the run.

    Args:
        phase: Stage that has ranks.
        spec: Checked spec.
        target: Where on the cluster it works.
        run: Identity of the run.
        work: Name of the stage's directory, which follows from what it reads.

    Raises:
        ValueError: The spec's tracking server cannot be named in a manifest, or is none.
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
    job = _ranks_of(phase, spec, target, run=run, work=work)
    training = _known(training_of(job, pods=launch.pods, owner=None))
    kind, manifest = rendered(launch, training=training)
    del manifest["metadata"]["annotations"]
    return kind, manifest


def _ranks_of(
    phase: RanksPhase, spec: PipelineSpec, target: Target, *, run: str, work: str
) -> RanksJob:
    context = cluster_context(spec, workdir=target.workdir).model_copy(update={"run_id": run})
    directory = join_uri(target.workdir, "stages", phase, work)
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


def _known(training: Training) -> Training:
    """Without what is taken from the step's environment: here is another one."""
    known = {key: value for key, value in training.environment.items() if key not in PASSED_ON}
    return replace(training, environment=known, passing_environment={})
