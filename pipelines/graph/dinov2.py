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
from k8s.launchers import Processes, TrainJob
from k8s.placement import Volume
from pipelines.graph.placement import launcher_of, place, place_on_cluster
from pipelines.spec.pipeline_spec import PipelineSpec
from pipelines.spec.placement import FOLLOWER, Resources, without_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Puts the tasks of a spec where they belong."""

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

    def put(
        self,
        task: PipelineTask,
        *,
        stage: str,
        resources: Resources,
        follower: Resources | None = None,
        trains: bool = False,
    ) -> None:
        """Place a task.

        Args:
            task: The step.
            stage: Its name.
            resources: From the spec.
            follower: What it asks for itself where its ranks run on pods of their own, which get
                the resources of the spec; None for a step without ranks.
            trains: Whether its ranks train: then it does no more than follow them, and nodes
                matter to them even without accelerators.
        """
        follower = FOLLOWER if trains else follower
        following = None if isinstance(self.launcher, Processes) else follower
        own = following or resources
        place(task, resources=own, image=self.spec.image, volume=self.volume)
        if self.on_cluster:
            place_on_cluster(
                task,
                stage=stage,
                placement=self.spec.placement,
                is_heavy=(trains and following is None) or own.num_gpus > 0,
                follows=following is not None,
            )

    @property
    def launcher(self) -> Processes | TrainJob:
        """What starts the ranks of a stage; here always processes."""
        return self.spec.placement.launcher if self.on_cluster else Processes()

    @property
    def curator(self) -> Resources | None:
        """What curation asks for itself while pods of their own embed for it; None if none do."""
        if not self.spec.curate.embeds_on_ranks(on_cluster=self.on_cluster):
            return None
        return without_gpus(self.spec.resources.curate)

    def launch(self, resources: Resources) -> str:
        """How a stage starts its ranks, JSON."""
        if not self.on_cluster:
            return self.launcher.model_dump_json()
        return launcher_of(
            self.spec.placement, resources=resources, image=self.spec.image, volume=self.volume
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
    resources = spec.resources
    volume = (volume or spec.placement.volume) if on_cluster else None
    places = _Places(spec=spec, volume=volume, on_cluster=on_cluster)

    @dsl.pipeline(
        name=f"dinopipe-{spec.name}",
        description="Curates images, trains a DINOv2 backbone, evaluates and registers it.",
        pipeline_config=places.config,
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
        curated = curate(config=curate_config, launcher=places.launch(resources.curate), **run)
        places.put(curated, stage="curate", resources=resources.curate, follower=places.curator)
        dataset = curated.outputs["dataset"]
        pretrained = pretrain(
            config=pretrain_config,
            launcher=places.launch(resources.pretrain),
            dataset=dataset,
            **run,
        )
        places.put(pretrained, stage="pretrain", resources=resources.pretrain, trains=True)
        finetuned = finetune(
            config=finetune_config,
            launcher=places.launch(resources.finetune),
            dataset=dataset,
            pretrained=pretrained.outputs["checkpoint"],
            **run,
        )
        places.put(finetuned, stage="finetune", resources=resources.finetune, trains=True)
        checkpoint = finetuned.outputs["checkpoint"]
        measured = evaluate(config=evaluate_config, dataset=dataset, checkpoint=checkpoint, **run)
        places.put(measured, stage="evaluate", resources=resources.evaluate)
        registered = register(
            config=register_config,
            dataset=dataset,
            checkpoint=checkpoint,
            report=measured.outputs["report"],
            **run,
        )
        places.put(registered, stage="register", resources=resources.registry)

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
