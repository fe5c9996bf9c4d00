"""Runs a compiled pipeline on this machine."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from components.runtime.context import RunContext
from components.runtime.interrupts import StopRequests
from components.runtime.mlflow_requests import check_reachable
from components.runtime.storage import delete, join_uri, upload
from components.runtime.tracking import Status, Tracker
from dinov2_core.errors import LeaseLost, TrackingRefused, TrackingUnavailable
from pipelines.graph.dinov2 import compile_pipeline
from pipelines.local.display import RunDisplay, read_progress
from pipelines.local.docker_containers import DockerContainers
from pipelines.local.kfp_execution import HostProcesses, logged, run_package
from pipelines.local.workdir import (
    RESULT,
    absolute_workdir,
    context_for,
    exclusive_workdir,
    write_state,
)
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec

Runner = Literal["subprocess", "docker"]
StageRunner = HostProcesses | DockerContainers
Outcome = Literal["succeeded", "failed", "interrupted"]

MLFLOW_STATUS: dict[Outcome, Status] = {
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """How a run on this machine ended."""

    context: RunContext
    outcome: Outcome
    seconds: float
    parent_run_id: str
    """MLflow run of the whole pipeline."""
    log: Path


def run_locally(
    spec: PipelineSpec,
    *,
    workdir: str,
    runner: Runner,
    use_cache: bool,
    profile_steps: int = 0,
    display: RunDisplay,
    stop: StopRequests,
) -> LocalRun:
    """Compile the pipeline and run it here, stage after stage.

    Args:
        spec: Checked spec.
        workdir: Path or s3:// URI; everything is written below it.
        runner: Host processes, or containers of the spec's image.
        use_cache: Whether finished stages are reused, if the spec does not forbid it.
        profile_steps: Steps of each training stage that still has some to trace; 0 traces none.
        display: Shows where things are, what stages print and how far they are.
        stop: Once asked to stop, the running stage is interrupted, asked twice it is killed.

    Raises:
        SettingsError: The work directory cannot be used, no Docker engine answers, or it does not
            have the image.
        TrackingUnavailable, TrackingRefused: The tracking server does not answer, or refuses.
    """
    started = time.monotonic()
    workdir = absolute_workdir(workdir)
    check_reachable(spec.tracking.uri)
    with exclusive_workdir(workdir):
        context = context_for(
            spec, workdir=workdir, use_cache=use_cache, profile_steps=profile_steps
        )
        stages: StageRunner = (
            DockerContainers(spec, workdir=context.root) if runner == "docker" else HostProcesses()
        )
        log = context.root / "logs" / f"{context.run_id}.log"
        write_state(context, status="running")
        delete(join_uri(workdir, RESULT))
        outcome: Outcome = "failed"
        tracker, parent = None, ""
        try:
            tracker = Tracker(context)
            parent = tracker.parent()
            tracker.open(parent).log_params(json.loads(spec.model_dump_json()))
            package = context.root / "pipeline.yaml"
            compile_pipeline(
                spec, context=context.model_dump_json(), path=package, on_cluster=False
            )
            display.start(context, log=log)
            outcome = _execute(package, stages, context, log=log, display=display, stop=stop)
        finally:
            if tracker is not None and parent:
                with contextlib.suppress(TrackingUnavailable, TrackingRefused):  # it may have died
                    tracker.end_parent(MLFLOW_STATUS[outcome])
            write_state(context, status=outcome)
            upload(log, context.uri_of(log))
        return LocalRun(
            context=context,
            outcome=outcome,
            seconds=time.monotonic() - started,
            parent_run_id=parent,
            log=log,
        )


def _execute(
    package: Path,
    stages: StageRunner,
    context: RunContext,
    *,
    log: Path,
    display: RunDisplay,
    stop: StopRequests,
) -> Outcome:
    """Run the package on a thread of its own while this one shows its progress."""
    shutil.rmtree(context.progress_directory, ignore_errors=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run_package(package, runner=stages.kfp_runner, root=context.root / "kfp")
        except BaseException as error:
            failures.append(error)

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, logged(file, display.line):
        thread = threading.Thread(target=work, name="pipeline", daemon=True)
        if not stop.count:
            thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                display.refresh()
                if stop.count:
                    stages.interrupt()
                if stop.count > 1:
                    stages.kill()
        except LeaseLost:  # another run works here now
            stages.kill()
            raise
        for failure in failures:
            file.write(f"{type(failure).__name__}: {failure}\n")
    last = read_progress(context.progress_directory, list(STAGES)[-1])
    if last is not None and last.state in ("succeeded", "cached") and not failures:
        return "succeeded"
    return "interrupted" if stop.count else "failed"
