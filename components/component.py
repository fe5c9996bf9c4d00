"""The container of a stage's component: its program and the flags that all stages have."""

from kfp import dsl


def stage_container(module: str, *, output: str, **flags: str) -> dsl.ContainerSpec:
    """A container that runs a stage's program.

    Args:
        module: Program, run with `python3 -m`.
        output: Path of the manifest that it writes.
        flags: Value of every other flag, by its name with underscores.
    """
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    named |= {"output": output, "executor-input": dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER}
    return dsl.ContainerSpec(
        image="dinopipe",
        command=["python3", "-m", module],
        args=[part for name, value in named.items() for part in (f"--{name}", value)],
    )
