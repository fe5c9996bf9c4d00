"""The graph: curate >> pretrain >> finetune >> evaluate >> register."""

from pathlib import Path

from kfp import compiler, dsl
from kfp.dsl.graph_component import GraphComponent

from components.curate.component import curate
from components.evaluate.component import evaluate
from components.register.component import register
from components.train.component import finetune, pretrain
from pipelines.placement import Volume, place
from pipelines.spec import PipelineSpec


def build(spec: PipelineSpec, *, context: str, volume: Volume | None = None) -> GraphComponent:
    """The pipeline of a spec; each stage's settings are a parameter that can be overridden.

    Args:
        spec: Checked spec.
        context: Default of the parameter `context`: work directory and tracking as JSON.
        volume: Holds the work directory on a cluster; None on this machine.
    """
    image, resources = spec.image, spec.resources

    @dsl.pipeline(
        name=f"dinopipe-{spec.name}",
        description="Curates images, trains a DINOv2 backbone, evaluates and registers it.",
    )
    def dinov2(
        context: str = context,
        curate_config: str = spec.curate_stage.model_dump_json(),
        pretrain_config: str = spec.pretrain_stage.model_dump_json(),
        finetune_config: str = spec.finetune_stage.model_dump_json(),
        evaluate_config: str = spec.evaluate_stage.model_dump_json(),
        register_config: str = spec.registry.model_dump_json(),
    ) -> None:
        job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        curated = curate(config=curate_config, context=context, kubeflow_run=job)
        place(curated, resources=resources.curate, image=image, volume=volume)
        dataset = curated.outputs["dataset"]
        pretrained = pretrain(
            config=pretrain_config, context=context, kubeflow_run=job, dataset=dataset
        )
        place(pretrained, resources=resources.pretrain, image=image, volume=volume)
        finetuned = finetune(
            config=finetune_config,
            context=context,
            kubeflow_run=job,
            dataset=dataset,
            pretrained=pretrained.outputs["checkpoint"],
        )
        place(finetuned, resources=resources.finetune, image=image, volume=volume)
        checkpoint = finetuned.outputs["checkpoint"]
        measured = evaluate(
            config=evaluate_config,
            context=context,
            kubeflow_run=job,
            dataset=dataset,
            checkpoint=checkpoint,
        )
        place(measured, resources=resources.evaluate, image=image, volume=volume)
        registered = register(
            config=register_config,
            context=context,
            kubeflow_run=job,
            dataset=dataset,
            checkpoint=checkpoint,
            report=measured.outputs["report"],
        )
        place(registered, resources=resources.registry, image=image, volume=volume)

    return dinov2


def compile_pipeline(
    spec: PipelineSpec, *, context: str, path: Path, volume: Volume | None = None
) -> None:
    """Write the intermediate representation that any Kubeflow Pipelines client can submit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build(spec, context=context, volume=volume), package_path=str(path))
