"""Commands of `dinopipe` that talk to Kubeflow Pipelines."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_core.errors import ExitCode, InputError, PipelinesRefused, PipelinesUnavailable
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec, load_spec

if TYPE_CHECKING:  # the client is loaded by the commands that need it
    import kfp

    from pipelines.cluster.recurring_run import RecurringRun
    from pipelines.cluster.runs import RunState, Task
    from pipelines.cluster.submit import Target

LAST_LINES = 20
DIGEST = "@sha256:"

Commands = Any
"""What `ArgumentParser.add_subparsers` gives."""


def add_commands(commands: Commands) -> None:
    """Add compile, submit, status, logs, wait, cancel, schedule and schedules."""
    compiled = commands.add_parser("compile", help="write the pipeline for a Kubeflow cluster")
    compiled.add_argument("spec", type=Path)
    compiled.add_argument(
        "-o", "--output", type=Path, default=Path("pipeline.yaml"), help="file to write"
    )
    add_target_flags(compiled)
    compiled.set_defaults(command=_compile)

    server = server_flags()
    submit = commands.add_parser("submit", parents=[server], help="run a spec on a cluster")
    submit.add_argument("spec", type=Path)
    add_target_flags(submit)
    submit.add_argument("--no-cache", action="store_true", help="do finished stages again")
    submit.add_argument("--wait", action="store_true", help="until it has ended")
    submit.set_defaults(command=_submit)
    _add_time_limit(submit)

    for name, command, text in (
        ("status", _status, "show a run on a cluster and its stages"),
        ("wait", _wait, "wait until a run on a cluster has ended, however it ends"),
        ("logs", _logs, "show what a stage wrote on a cluster"),
        ("cancel", _cancel, "stop a run on a cluster"),
    ):
        parser = commands.add_parser(name, parents=[server], help=text)
        parser.add_argument("run", metavar="RUN", help="id that submit printed")
        parser.set_defaults(command=command, spec=None)
        if command is _wait:
            _add_time_limit(parser)
        if command is _logs:
            parser.add_argument("--stage", choices=STAGES, help="default: failed or latest")

    schedule = commands.add_parser(
        "schedule", parents=[server], help="let a cluster run a spec by its `schedule:`"
    )
    schedule.add_argument("spec", type=Path)
    add_target_flags(schedule)
    change = schedule.add_mutually_exclusive_group()
    change.add_argument("--pause", action="store_true", help="do not fire until --resume")
    change.add_argument("--resume", action="store_true", help="fire again, from the next time on")
    change.add_argument("--delete", action="store_true", help="delete it and its unfinished runs")
    schedule.set_defaults(command=_schedule)
    schedules = commands.add_parser("schedules", parents=[server], help="list what is scheduled")
    schedules.set_defaults(command=_schedules, spec=None)


def server_flags() -> argparse.ArgumentParser:
    """Flags of server and credentials, as a parent of other parsers."""
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("server")
    group.add_argument("--host", default="", help="address; default: KF_PIPELINES_ENDPOINT")
    group.add_argument("--namespace", default="", help="of a multi-user installation")
    group.add_argument(
        "--token-file", type=Path, help="bearer token; default: KF_PIPELINES_TOKEN, or the pod's"
    )
    group.add_argument(
        "--cookie-file", type=Path, help="session cookie; default: KF_PIPELINES_COOKIE"
    )
    group.add_argument("--ca-file", type=Path, help="certificates to trust, PEM")
    return flags


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of work directory, volume and account on the cluster."""
    parser.add_argument(
        "--workdir", default="", help="path on the volume, or s3://...; default: the volume's mount"
    )
    parser.add_argument(
        "--claim", default="", help="volume claim of all pods; default: placement.volume"
    )
    parser.add_argument("--service-account", default="", help="of the pods")


def target_from(args: argparse.Namespace, spec: PipelineSpec) -> Target:
    """Work directory, volume and account on the cluster, by the flags and the spec."""
    from pipelines.cluster.submit import target_of

    return target_of(
        spec, workdir=args.workdir, claim=args.claim, service_account=args.service_account
    )


def _add_time_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="default: no limit")


def client_of(args: argparse.Namespace) -> kfp.Client:
    """A client of the server that the flags name."""
    from pipelines.cluster.client import connect, find_credentials, resolve_host

    credentials = find_credentials(
        token_file=args.token_file, cookie_file=args.cookie_file, environment=os.environ
    )
    return connect(
        resolve_host(args.host),
        namespace=args.namespace,
        credentials=credentials,
        ca_file=args.ca_file,
    )


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _compile(args: argparse.Namespace) -> int:
    from pipelines.cluster.submit import compile_for

    spec = load_spec(args.spec)
    compile_for(spec, target_from(args, spec), path=args.output)
    _print(f"wrote {args.output}")
    return 0


def _submit(args: argparse.Namespace) -> int:
    from pipelines.cluster.submit import submit

    spec = load_spec(args.spec)
    client = client_of(args)
    _warn_if_not_by_digest(spec)
    run = submit(client, spec, target_from(args, spec), use_cache=not args.no_cache)
    state = "new" if run.version.is_new else "known"
    _print(f"version {run.version.name} ({state})\nrun {run.run_id}\n{run.address}")
    return _wait_for(client, run.run_id, args) if args.wait else 0


def _warn_if_not_by_digest(spec: PipelineSpec) -> None:
    if DIGEST not in spec.image:
        sys.stderr.write(
            f"image: {spec.image} can change between stages; name it by digest "
            f"({spec.image.partition(':')[0]}{DIGEST}...)\n"
        )


def _wait(args: argparse.Namespace) -> int:
    return _wait_for(client_of(args), args.run, args)


def _wait_for(client: kfp.Client, run_id: str, args: argparse.Namespace) -> int:
    """Follow a run to its end; 0 if it succeeded."""
    from pipelines.cluster.runs import SUCCEEDED, PollingPolicy, wait

    policy = PollingPolicy(timeout_seconds=args.timeout)
    shown: dict[str, str] = {}

    def show(state: RunState) -> None:
        for task in state.tasks:
            if shown.get(task.name) != task.state:
                shown[task.name] = task.state
                _print(_task_line(task))

    try:
        state = wait(client, run_id, policy=policy, on_change=show)
    except TimeoutError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"the run goes on; dinopipe wait {run_id} takes up waiting again\n")
        return ExitCode.INTERRUPTED
    _print(_headline(state))
    if state.state == SUCCEEDED:
        return 0
    sys.stdout.flush()
    sys.stderr.write(_failure_report(client, state, namespace=args.namespace))
    return 1


def _failure_report(client: kfp.Client, state: RunState, *, namespace: str) -> str:
    """The failed stage's reason and last lines."""
    from pipelines.cluster.runs import logs

    task = state.failed_task
    if task is None:
        reason = state.reason or "the server gives no reason"
        return f"{state.state}: {reason}\nlook at it: {state.address}\n"
    try:
        text = logs(client, task, run_id=state.run_id, namespace=namespace)
        lines = "\n".join(text.rstrip().splitlines()[-LAST_LINES:])
    except (InputError, PipelinesRefused, PipelinesUnavailable) as error:
        lines = str(error)
    reason = task.reason or state.reason or "the server gives no reason"
    return f"{task.name} {state.state}: {reason}\n{lines}\nlook at it: {state.address}\n"


def _status(args: argparse.Namespace) -> int:
    from pipelines.cluster.runs import state_of

    state = state_of(client_of(args), args.run)
    lines = [_headline(state), *(_task_line(task) for task in state.tasks), state.address]
    _print("\n".join(lines))
    return 0


def _headline(state: RunState) -> str:
    reason = f": {state.reason}" if state.reason else ""
    return f"{state.name or state.run_id} {state.state}{reason}"


def _task_line(task: Task) -> str:
    took = "" if task.seconds is None else f"{task.seconds / 60:.1f} min"
    return f"  {task.name:<10}{task.state:<11}{took:>10}  {task.reason}".rstrip()


def _logs(args: argparse.Namespace) -> int:
    from pipelines.cluster.runs import logs, state_of

    client = client_of(args)
    state = state_of(client, args.run)
    by_name = {task.name: task for task in state.tasks}
    if not by_name:
        raise InputError(f"run {args.run} has begun no stage yet ({state.state}); wait for it")
    task = by_name.get(args.stage) if args.stage else state.failed_task or state.tasks[-1]
    if task is None:
        raise InputError(
            f"run {args.run} has not begun {args.stage}; it has begun {', '.join(by_name)}"
        )
    _print(logs(client, task, run_id=args.run, namespace=args.namespace).rstrip())
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from pipelines.cluster.runs import cancel

    before = cancel(client_of(args), args.run)
    if before.has_ended:
        _print(f"run {args.run} had ended already: {before.state}")
    else:
        _print(f"run {args.run} is being canceled; dinopipe wait {args.run} sees it end")
    return 0


def _schedule(args: argparse.Namespace) -> int:
    from pipelines.cluster import recurring_run as schedule

    spec, client = load_spec(args.spec), client_of(args)
    if args.delete:
        schedule.delete(client, spec)
        _print(f"{schedule.schedule_name(spec)} deleted")
        return 0
    change: Callable[..., schedule.RecurringRun] | None = None
    if args.pause or args.resume:
        change = schedule.pause if args.pause else schedule.resume
    if change is not None:
        item, result = change(client, spec), "paused" if args.pause else "resumed"
    else:
        _warn_if_not_by_digest(spec)
        item, result = schedule.apply(client, spec, target_from(args, spec))
    _print(f"{item.name} {result}: {_entry(item)}")
    if item.is_enabled and spec.schedule is not None:
        firings = spec.schedule.next_firings(datetime.now(tz=UTC))
        _print("next: " + ", ".join(f"{moment:%a %Y-%m-%d %H:%M %Z}" for moment in firings))
    elif not item.is_enabled:
        _print(f"it is paused; dinopipe schedule {args.spec} --resume lets it fire again")
    return 0


def _schedules(args: argparse.Namespace) -> int:
    from pipelines.cluster.recurring_run import recurring_runs

    found = recurring_runs(client_of(args))
    for item in found:
        _print(f"{item.name}  {_entry(item)}")
    if not found:
        _print("nothing is scheduled; dinopipe schedule SPEC does it")
    return 0


def _entry(item: RecurringRun) -> str:
    state = "enabled" if item.is_enabled else "paused"
    return f"{item.schedule}  {state}  {item.recurring_run_id}"
