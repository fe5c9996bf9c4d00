"""The command that runs a pipeline on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.spec.problems import Problem, SpecError
from pipelines.spec_commands import checked_spec

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.local.summary import RunResult
    from pipelines.spec.pipeline_spec import PipelineSpec

INTERRUPTED = "interrupted; the same command continues where this run stopped"


def add_commands(commands: Any) -> None:
    """Add run."""
    run = commands.add_parser("run", help="run the pipeline on this machine")
    run.add_argument("spec", type=Path)
    run.add_argument(
        "--workdir",
        required=True,
        help="everything is written here: a folder or s3://BUCKET/PREFIX",
    )
    run.add_argument(
        "--runner",
        choices=("subprocess", "docker"),
        default="subprocess",
        help="processes of this machine, or containers of the spec's image",
    )
    run.add_argument("--no-cache", action="store_true", help="do finished stages again")
    run.add_argument(
        "--profile", type=int, default=0, metavar="N", help="trace N steps of each training stage"
    )
    run.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    from components.runtime.interrupts import StopRequests
    from pipelines.local.display import console, run_display, summary_table
    from pipelines.local.run import run_locally
    from pipelines.local.summary import result_of, summary_rows, write_result

    spec = checked_spec(args.spec)
    _check_one_machine(spec)
    screen = console()
    with StopRequests() as stop, run_display(screen) as display:
        run = run_locally(
            spec,
            workdir=args.workdir,
            runner=args.runner,
            use_cache=not args.no_cache,
            profile_steps=args.profile,
            display=display,
            stop=stop,
        )
        result = result_of(spec, run)
        path = write_result(result, run.context.workdir)
    screen.print(summary_table(summary_rows(result)))
    if result.status == "succeeded":
        _print_success(screen, spec, result, path=path)
        return 0
    if result.status == "interrupted":
        stop.raise_first(INTERRUPTED)
    stage = result.failed_stage or "the pipeline"
    error = result.stages[stage].error if stage in result.stages else "did not start"
    sys.stdout.flush()
    sys.stderr.write(f"log: {run.log}\n{stage} failed: {error}\n")
    return 1


def _check_one_machine(spec: PipelineSpec) -> None:
    nodes = spec.pretrain.topology.num_nodes
    if nodes > 1:
        message = "is more than this one machine; set it to 1, or compile for a cluster"
        raise SpecError([Problem(path="pretrain.topology.num_nodes", value=nodes, message=message)])


def _print_success(screen: Console, spec: PipelineSpec, result: RunResult, *, path: str) -> None:
    from components.runtime.uris import is_remote
    from pipelines.local.display import mlflow_hint

    model = result.mlflow
    screen.out(
        f"succeeded: models:/{model.model_name}@{model.alias} (version {model.model_version}); "
        f"numbers in {path}\nlook at it: {mlflow_hint(model.tracking_uri)}"
    )
    if is_remote(path) and not spec.tracking.uri:
        screen.out("MLflow's store stays on this machine; set tracking.uri for one that others see")
