"""The two training stages as Kubeflow components: one program, two declarations."""

from typing import Any

from kfp import dsl


def _container(
    stage_name: str, settings: list[str], inputs: list[Any], checkpoint: Any
) -> dsl.ContainerSpec:
    flags = ("--config", "--context", "--launcher", "--kubeflow-run")
    return dsl.ContainerSpec(
        image="dinopipe",
        command=["python3", "-m", "components.train"],
        args=[
            *("--phase", stage_name),
            *(part for pair in zip(flags, settings, strict=True) for part in pair),
            *inputs,
            *("--output", checkpoint.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )


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
    inputs = ["--dataset", dataset.path]
    return _container("pretrain", [config, context, launcher, kubeflow_run], inputs, checkpoint)


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
    inputs = ["--dataset", dataset.path, "--pretrained", pretrained.path]
    return _container("finetune", [config, context, launcher, kubeflow_run], inputs, checkpoint)
