"""The command `dinopipe plan`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dinov2_core.errors import SettingsError
from pipelines.cluster.commands import add_target_flags, client_of, server_flags, target_from
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec

CLUSTER = "cluster"


def add_commands(commands: Any) -> None:
    """Add plan to the commands of `dinopipe`."""
    plan = commands.add_parser(
        "plan",
        parents=[server_flags()],
        help="show memory, time and cost of a spec, and what it would change",
    )
    plan.add_argument("spec", type=Path)
    plan.add_argument(
        "--hardware",
        default="a100-80",
        help="a100-80, h100, h200, cpu or FILE[:NAME] (%(default)s)",
    )
    plan.add_argument(
        "--price-per-gpu-hour", type=float, default=0.0, metavar="PRICE", help="in any currency"
    )
    plan.add_argument("--no-scaling", action="store_true", help="do not plan 8 to 1,024 ranks")
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON only")
    plan.add_argument("-o", "--output", type=Path, help="directory for the files of the plan")
    plan.add_argument(
        "--against",
        help="show what changes: directory of an earlier plan, or `cluster`: the pipeline that "
        "Kubeflow has and, by kubectl diff, the objects of --overlay",
    )
    plan.add_argument(
        "--overlay",
        default="",
        help="kustomize overlay to render as well: prod-gpu, or a directory",
    )
    add_target_flags(plan)
    plan.set_defaults(command=_plan)


def _plan(args: argparse.Namespace) -> int:
    from pipelines.local.display import console
    from pipelines.plan.estimate import plan_stages
    from pipelines.plan.hardware import load_hardware
    from pipelines.plan.report import plan_json, plan_table, proposals_table, scaling_table

    if args.price_per_gpu_hour < 0:
        raise SettingsError(f"--price-per-gpu-hour {args.price_per_gpu_hour} is less than 0")
    spec, price = load_spec(args.spec), args.price_per_gpu_hour
    hardware = load_hardware(args.hardware)
    changes = _changes(args, spec)
    plans = plan_stages(
        spec,
        hardware=hardware,
        price_per_gpu_hour=price,
        scales=not args.no_scaling,
    )
    if args.json:
        sys.stdout.write(plan_json(plans) + "\n")
        return 0
    screen = console()
    screen.print(plan_table(plans, hardware=args.hardware, price=price))
    for plan in plans:
        if not plan.fits:
            screen.print(proposals_table(plan.proposals, stage=plan.stage))
        if plan.scaling:
            screen.print(scaling_table(plan.scaling, stage=plan.stage, memory_gib=plan.memory_gib))
    if changes is not None:
        sys.stdout.write((changes or "nothing would change") + "\n")
    return 0


def _changes(args: argparse.Namespace, spec: PipelineSpec) -> str | None:
    """Write the files of the plan and report what changes; None where neither is wanted."""
    from pipelines.plan.kubectl import built_manifests, diff_with_cluster
    from pipelines.plan.output_directory import read_plan, write_plan
    from pipelines.plan.render import PIPELINE, deployed_on, differences, render

    if args.output is None and args.against is None:
        return None
    is_for_files = args.output is not None or args.against != CLUSTER
    manifests = built_manifests(args.overlay) if args.overlay and is_for_files else []
    planned = render(spec, target_from(args, spec), manifests=manifests)
    if args.against == CLUSTER:
        deployed = deployed_on(client_of(args), pipeline=f"dinopipe-{spec.name}")
        pipeline = differences(deployed, {PIPELINE: planned[PIPELINE]})
        lines = [pipeline or f"{PIPELINE} is as deployed"]
        lines += [diff_with_cluster(args.overlay)] if args.overlay else []
        report = "\n".join(lines)
    else:
        directory = Path(args.against) if args.against else args.output
        if args.against and not directory.is_dir():
            raise SettingsError(f"--against {directory} is no directory; name an earlier plan's")
        report = differences(read_plan(directory, needs_index=args.against is None), planned)
    if args.output is not None:
        write_plan(planned, args.output)
    return report
