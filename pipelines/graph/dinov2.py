"""The graph: curate >> pretrain >> finetune >> evaluate >> register."""

from dataclasses import dataclass
from pathlib import Path

from kfp import compiler, dsl
from kfp.dsl import PipelineTask
from kfp.dsl.graph_component import GraphComponent

from components.curate.component import curate
from components.evaluate.component import evaluate
from components.register.component import register
from components.train.component import finetune, pretrain
from k8s.launchers import Processes
from k8s.placement import Volume
from pipelines.graph.placement import (
    launcher_of,
    place_on_cluster,
    set_container,
    set_resources,
)
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec
from pipelines.spec.placement import FOLLOWER, Resources, without_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class _TaskPlacement:
    """Gives the tasks of a spec their containers, nodes and launchers."""

    spec: PipelineSpec
    volume: Volume | None
    on_cluster: bool

    @property
    def config(self) -> dsl.PipelineConfig | None:
        """Limits of the whole pipeline."""
        if not self.on_cluster:
            return None
        deadline = self.spec.placement.deadlines.pipeline_seconds
        return dsl.PipelineConfig(active_deadline_seconds=deadline)

    def apply(self, task: PipelineTask, *, stage: str) -> None:
        """Place the task of a stage."""
        set_container(task, image=self.spec.image)
        if not self.on_cluster:
            return
        following = self._resources_while_following(stage)
        own = following or self.spec.resources.of(stage)
        set_resources(task, resources=own, volume=self.volume)
        trains_itself = STAGES[stage].trains and following is None
        place_on_cluster(
            task,
            stage=stage,
            placement=self.spec.placement,
            is_heavy=trains_itself or own.num_gpus > 0,
            follows=following is not None,
        )

    def _resources_while_following(self, stage: str) -> Resources | None:
        """What the task needs itself while ranks on pods of their own work for it; else None."""
        if isinstance(self.spec.placement.launcher, Processes):
            return None
        if STAGES[stage].trains:
            return FOLLOWER
        if stage == "curate" and self.spec.curate.embeds_on_ranks(on_cluster=True):
            return without_gpus(self.spec.resources.curate)
        return None

    def launcher(self, stage: str) -> str:
        """How the stage starts its ranks, JSON."""
        if not self.on_cluster:
            return Processes().model_dump_json()
        return launcher_of(
            self.spec.placement,
            resources=self.spec.resources.of(stage),
            image=self.spec.image,
            volume=self.volume,
        )


def build(
    spec: PipelineSpec, *, context: str, volume: Volume | None = None, on_cluster: bool = True
) -> GraphComponent:
    """The pipeline of a spec; each stage's settings are a parameter that can be overridden.

    Args:
        spec: Checked spec.
        context: Default of the parameter `context`: work directory and tracking as JSON.
        volume: Holds the work directory on a cluster; None for that of the spec's placement.
        on_cluster: Whether the spec's placement counts; on this machine it does not.
    """
    volume = (volume or spec.placement.volume) if on_cluster else None
    placement = _TaskPlacement(spec=spec, volume=volume, on_cluster=on_cluster)

    @dsl.pipeline(
        name=f"dinopipe-{spec.name}",
        description="Curates images, trains a DINOv2 backbone, evaluates and registers it.",
        pipeline_config=placement.config,
    )
    def dinov2(
        context: str = context,
        curate_config: str = spec.curate_stage.model_dump_json(),
        pretrain_config: str = spec.pretrain_stage.model_dump_json(),
        finetune_config: str = spec.finetune_stage.model_dump_json(),
        evaluate_config: str = spec.evaluate_stage.model_dump_json(),
        register_config: str = spec.registry.model_dump_json(),
    ) -> None:
        run = {"context": context, "kubeflow_run": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        curated = curate(config=curate_config, launcher=placement.launcher("curate"), **run)
        dataset = curated.outputs["dataset"]
        pretrained = pretrain(
            config=pretrain_config, launcher=placement.launcher("pretrain"), dataset=dataset, **run
        )
        finetuned = finetune(
            config=finetune_config,
            launcher=placement.launcher("finetune"),
            dataset=dataset,
            pretrained=pretrained.outputs["checkpoint"],
            **run,
        )
        checkpoint = finetuned.outputs["checkpoint"]
        evaluated = evaluate(config=evaluate_config, dataset=dataset, checkpoint=checkpoint, **run)
        registered = register(
            config=register_config,
            dataset=dataset,
            checkpoint=checkpoint,
            report=evaluated.outputs["report"],
            **run,
        )
        tasks = (curated, pretrained, finetuned, evaluated, registered)
        for stage, task in zip(STAGES, tasks, strict=True):
            placement.apply(task, stage=stage)

    return dinov2


def compile_pipeline(
    spec: PipelineSpec,
    *,
    context: str,
    path: Path,
    volume: Volume | None = None,
    on_cluster: bool = True,
) -> None:
    """Write the intermediate representation that any Kubeflow Pipelines client can submit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pipeline = build(spec, context=context, volume=volume, on_cluster=on_cluster)
    compiler.Compiler().compile(pipeline, package_path=str(path))
