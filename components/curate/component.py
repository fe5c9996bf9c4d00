"""The curation stage as a Kubeflow component."""

from kfp import dsl

from components.component import stage_container


@dsl.container_component
def curate(
    config: str,
    context: str,
    launcher: str,
    kubeflow_run: str,
    dataset: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """Turn source images into a curated data set: no copies, no leaks, no broken files.

    Args:
        config: Settings of the stage as JSON.
        context: Work directory, run identity and tracking as JSON.
        launcher: How ranks that embed are started, as JSON.
        kubeflow_run: Identity of the Kubeflow run, for a context without one.
        dataset: Manifest of the shards and of the table of all images.
        metrics: Counts.
    """
    return stage_container(
        "components.curate",
        config=config,
        context=context,
        launcher=launcher,
        kubeflow_run=kubeflow_run,
        output=dataset.path,
    )
