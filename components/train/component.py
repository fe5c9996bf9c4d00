"""The two training stages as Kubeflow components: one program, two declarations."""

from kfp import dsl

from components.component import stage_container


@dsl.container_component
def pretrain(
    config: str,
    context: str,
    launcher: str,
    kubeflow_run: str,
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """Train student and teacher from scratch or from given weights.

    Args:
        config: Settings of the stage as JSON.
        context: Work directory, run identity and tracking as JSON.
        launcher: How the ranks are started, as JSON.
        kubeflow_run: Identity of the Kubeflow run, for a context without one.
        dataset: Manifest of the curated data set.
        checkpoint: Manifest of the teacher and of the resumable state.
        metrics: Last losses and throughput.
    """
    return stage_container(
        "components.train",
        phase="pretrain",
        config=config,
        context=context,
        launcher=launcher,
        kubeflow_run=kubeflow_run,
        dataset=dataset.path,
        output=checkpoint.path,
    )


@dsl.container_component
def finetune(
    config: str,
    context: str,
    launcher: str,
    kubeflow_run: str,
    dataset: dsl.Input[dsl.Dataset],
    pretrained: dsl.Input[dsl.Model],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """Continue from the pretrained teacher for a few steps at a higher resolution.

    Args:
        config: Settings of the stage as JSON.
        context: Work directory, run identity and tracking as JSON.
        launcher: How the ranks are started, as JSON.
        kubeflow_run: Identity of the Kubeflow run, for a context without one.
        dataset: Manifest of the curated data set.
        pretrained: Manifest of the teacher to start from.
        checkpoint: Manifest of the teacher and of the resumable state.
        metrics: Last losses and throughput.
    """
    return stage_container(
        "components.train",
        phase="finetune",
        config=config,
        context=context,
        launcher=launcher,
        kubeflow_run=kubeflow_run,
        dataset=dataset.path,
        pretrained=pretrained.path,
        output=checkpoint.path,
    )
