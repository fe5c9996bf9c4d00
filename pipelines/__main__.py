"""The console command `dinopipe`."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from components.runtime.context import RunContext
from components.runtime.logging import set_up_logging
from components.runtime.uris import is_remote
from dinov2_core.errors import DinopipeError, exit_code_of
from pipelines.cluster.commands import add_cluster_commands, add_target_flags, target_from
from pipelines.plan.command import add_plan_command
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from pipelines.spec.problems import Problem, SpecError

logger = logging.getLogger(__name__)

STARTER = Path(__file__).parent / "specs" / "starter.yaml"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 a stage failed, 2 wrong input."""
    set_up_logging()
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except SpecError as error:
        count = len(error.problems)
        return _refuse(f"{args.spec} has {count} problem{'s' * (count > 1)}:\n{error}")
    except DinopipeError as error:
        logger.error("%s", error)
        return exit_code_of(error)
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}; choose another place")
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues where this run stopped")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinopipe", description="Turns unlabelled images into a registered DINOv2 backbone."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="write a commented starter spec")
    init.add_argument("spec", type=Path, nargs="?", default=Path("dinopipe.yaml"))
    init.set_defaults(command=_init)

    validate = commands.add_parser("validate", help="check a spec without starting anything")
    validate.add_argument("spec", type=Path)
    validate.set_defaults(command=_validate)

    schema = commands.add_parser("schema", help="print the spec's JSON schema, for editors")
    schema.set_defaults(command=_schema)

    compiled = commands.add_parser("compile", help="write the pipeline for a Kubeflow cluster")
    compiled.add_argument("spec", type=Path)
    compiled.add_argument("-o", "--output", type=Path, default=Path("pipeline.yaml"))
    add_target_flags(compiled)
    compiled.set_defaults(command=_compile)

    run = commands.add_parser("run", help="run the pipeline on this machine")
    run.add_argument("spec", type=Path)
    run.add_argument(
        "--workdir",
        required=True,
        help="everything is written here: a folder or s3://BUCKET/PREFIX",
    )
    run.add_argument("--runner", choices=("subprocess", "docker"), default="subprocess")
    run.add_argument("--no-cache", action="store_true", help="do finished stages again")
    run.add_argument(
        "--profile", type=int, default=0, metavar="N", help="trace N steps of each training stage"
    )
    run.set_defaults(command=_run)

    add_plan_command(commands)
    add_cluster_commands(commands)

    embed = commands.add_parser("embed", help="embed images with a registered teacher")
    embed.add_argument("images", help="file, folder, glob pattern, Parquet file or s3:// prefix")
    embed.add_argument("--model", required=True, help="such as models:/NAME@champion")
    embed.add_argument("-o", "--output", type=Path, default=Path("embeddings.parquet"))
    embed.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI")
    embed.add_argument("--batch-size", type=int, default=64)
    embed.add_argument("--trust-code", action="store_true", help="run a foreign model's code")
    embed.set_defaults(command=_embed, spec=None)

    export = commands.add_parser("export", help="write a registered teacher for another program")
    export.add_argument("--model", required=True, help="such as models:/NAME@champion")
    export.add_argument("--format", required=True, choices=("timm", "huggingface"))
    export.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    export.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI")
    export.set_defaults(command=_export, spec=None)
    return parser


def _refuse(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 2


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _init(args: argparse.Namespace) -> int:
    if args.spec.exists():
        return _refuse(f"{args.spec} exists already; name another file, or remove it first")
    args.spec.write_text(STARTER.read_text(encoding="utf-8"), encoding="utf-8")
    _say(f"wrote {args.spec}; set images.uri in it, then: dinopipe validate {args.spec}")
    return 0


def _checked(path: Path) -> PipelineSpec:
    """A spec that is right in itself and whose places exist.

    Raises:
        SpecError: It is not; the error lists every problem.
    """
    from pipelines.preflight import check_places

    spec = load_spec(path)
    problems = check_places(spec)
    if problems:
        raise SpecError(problems)
    return spec


def _validate(args: argparse.Namespace) -> int:
    spec = _checked(args.spec)
    learning, topology = spec.pretrain.learning, spec.pretrain.topology
    _say(
        f"{args.spec} is right: {spec.name}, {learning.optimization.num_steps} + "
        f"{spec.finetune.num_steps} steps on {topology.world_size} ranks, "
        f"peak learning rate {learning.optimization.peak_learning_rate:.3g}"
    )
    return 0


def _schema(_: argparse.Namespace) -> int:
    _say(json.dumps(PipelineSpec.model_json_schema(), indent=2))
    return 0


def _compile(args: argparse.Namespace) -> int:
    from pipelines.cluster.submit import compile_for

    spec = load_spec(args.spec)
    compile_for(spec, target_from(args, spec), path=args.output)
    _say(f"wrote {args.output}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from pipelines.local.display import console, summary_table
    from pipelines.local.run import run_locally
    from pipelines.local.summary import result_of, summary_rows, write_result

    spec = _checked(args.spec)
    if spec.pretrain.topology.num_nodes > 1:
        message = "is more than this one machine; set it to 1, or compile for a cluster"
        nodes = spec.pretrain.topology.num_nodes
        raise SpecError([Problem(path="pretrain.topology.num_nodes", value=nodes, message=message)])
    if args.runner == "docker":  # containers outlive the command, unless it passes its end on
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    screen = console()
    live = screen.is_terminal
    run = run_locally(
        spec,
        workdir=args.workdir,
        runner=args.runner,
        use_cache=not args.no_cache,
        profile_steps=args.profile,
        watch=partial(_watch_live, screen) if live else _watch_plainly,
        on_line=(lambda _: None) if live else screen.out,
    )
    result = result_of(spec, run)
    path = write_result(result, args.workdir)
    screen.print(summary_table(summary_rows(result)))
    if result.status == "succeeded":
        place = result.mlflow
        screen.print(
            f"succeeded: models:/{place.model_name}@{place.alias} (version "
            f"{place.model_version}); numbers in {path}\n"
            f"look at it: mlflow ui --backend-store-uri {place.tracking_uri}"
        )
        if is_remote(args.workdir) and not spec.tracking.uri:
            screen.print(
                "MLflow's store stays on this machine; set tracking.uri for one that others see"
            )
        return 0
    stage = result.failed_stage or "the pipeline"
    error = result.stages[stage].error if stage in result.stages else "did not start"
    sys.stdout.flush()
    sys.stderr.write(f"log: {run.log}\n{stage} failed: {error}\n")
    return 1


def _watch_live(screen: Console, context: RunContext, ended: threading.Event) -> None:
    from rich.live import Live

    from pipelines.local.display import progress_table

    with Live(console=screen, refresh_per_second=4, redirect_stdout=False) as live:
        while not ended.wait(0.25):
            live.update(progress_table(context.progress_directory))
        live.update(progress_table(context.progress_directory))


def _watch_plainly(_: RunContext, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        pass


def _embed(args: argparse.Namespace) -> int:
    from pipelines.model.embed import embed_images

    count, skipped = embed_images(
        args.images,
        model_uri=args.model,
        output=args.output,
        tracking_uri=args.tracking_uri,
        batch_size=args.batch_size,
        trusts_code=args.trust_code,
    )
    note = f"; {skipped} unreadable files have no embedding" if skipped else ""
    _say(f"wrote {count} rows to {args.output}{note}")
    return 1 if skipped == count else 0


def _export(args: argparse.Namespace) -> int:
    from pipelines.model.export import export_teacher

    checked = export_teacher(
        args.model, target=args.format, directory=args.output, tracking_uri=args.tracking_uri
    )
    _say(f"wrote {args.output}; {checked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
