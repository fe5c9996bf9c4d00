"""The evaluation stage as a Kubeflow component."""

from kfp import dsl

from components.component import stage_container


@dsl.container_component
def evaluate(
    config: str,
    context: str,
    kubeflow_run: str,
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """Measure a teacher's features beside baselines and picture them.

    Args:
        config: Settings of the stage as JSON.
        context: Work directory, run identity and tracking as JSON.
        kubeflow_run: Identity of the Kubeflow run, for a context without one.
        dataset: Manifest of the curated data set, for collapse indicators.
        checkpoint: Manifest of the teacher.
        report: Manifest of the numbers and pictures.
        metrics: The numbers.
    """
    return stage_container(
        "components.evaluate",
        config=config,
        context=context,
        kubeflow_run=kubeflow_run,
        dataset=dataset.path,
        checkpoint=checkpoint.path,
        output=report.path,
    )
