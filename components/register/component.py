"""The registration stage as a Kubeflow component."""

from kfp import dsl

from components.component import stage_container


@dsl.container_component
def register(
    config: str,
    context: str,
    kubeflow_run: str,
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    report: dsl.Input[dsl.Artifact],
    registration: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Register a teacher as a model version and give it the alias that the gate decides.

    Args:
        config: Settings of the stage as JSON.
        context: Work directory, run identity and tracking as JSON.
        kubeflow_run: Identity of the Kubeflow run, for a context without one.
        dataset: Manifest of the data it was trained on.
        checkpoint: Manifest of the teacher.
        report: Manifest of its numbers.
        registration: Manifest of the model version and of the decision.
    """
    return stage_container(
        "components.register",
        config=config,
        context=context,
        kubeflow_run=kubeflow_run,
        dataset=dataset.path,
        checkpoint=checkpoint.path,
        report=report.path,
        output=registration.path,
    )
