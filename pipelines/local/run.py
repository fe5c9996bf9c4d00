"""Runs a compiled pipeline on this machine through Kubeflow's own local execution."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import docker
from kfp import components, local
from kfp.local import subprocess_task_handler

from components.runtime.context import RunContext
from components.runtime.image_sources.folder import fixed_part
from components.runtime.lease import leased
from components.runtime.manifests import digest_of
from components.runtime.processes import COMPUTING
from components.runtime.storage import (
    delete,
    is_remote,
    join_uri,
    local_path,
    read_text,
    upload,
    write_text,
)
from components.runtime.tracking import TRACKING_ERRORS, Status, Tracker, check_reachable
from components.runtime.uris import CACHE_VARIABLE, cache_directory
from pipelines.graph.dinov2 import compile_pipeline
from pipelines.local.display import read_progress
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec

Runner = Literal["subprocess", "docker"]
Ending = Literal["succeeded", "failed", "interrupted"]

MLFLOW_STATUS: dict[Ending, Status] = {
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}

STATE = "state.json"
"""File of the work directory that holds the identity of its last run."""
RESULT = "run.json"
"""File of the work directory that says how its last run ended."""
STAGE_STARTS, STAGE_ENDS = "Streamed logs:", "finished with status"
"""Lines of Kubeflow between which a stage speaks."""
WORKDIR_LABEL = "dinopipe.workdir"
"""Label of a run's containers."""


class WorkdirError(ValueError):
    """The work directory cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """How a run on this machine ended."""

    context: RunContext
    succeeded: bool
    seconds: float
    parent_run_id: str
    log: Path


@contextlib.contextmanager
def claimed_workdir(workdir: str) -> Iterator[None]:
    """Make the work directory and keep other runs out of it.

    Raises:
        WorkdirError: It cannot be written to, or another run is at work in it.
        ValueError: Another machine is at work in the bucket's prefix.
        StorageError: The store does not answer.
    """
    advice = "choose another with --workdir"
    root = local_path(workdir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise WorkdirError(
            f"work directory {root} cannot be written to ({error.strerror}); {advice}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WorkdirError(
                f"another run is at work in {workdir}; wait for it, or {advice}"
            ) from error
        if not is_remote(workdir):
            yield
            return
        with leased(join_uri(workdir, "lease.json"), owner=f"machine {socket.gethostname()}"):
            yield


def context_for(
    spec: PipelineSpec, *, workdir: str, use_cache: bool, profile_steps: int = 0
) -> RunContext:
    """The context of a run: a new identity, or that of the same run if it did not finish."""
    use_cache = use_cache and spec.use_cache
    spec_sha256 = digest_of(spec)
    identity = _identity(spec_sha256, use_cache=use_cache)
    run_id = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    state = read_text(join_uri(workdir, STATE))
    if state is not None:
        last = json.loads(state)
        if last["identity"] == identity and last["status"] != "succeeded":
            run_id = last["run_id"]
    context = RunContext(
        workdir=workdir,
        run_id=run_id,
        run_name=spec.name,
        tracking_uri=spec.tracking.uri,
        experiment=spec.tracking.experiment,
        use_cache=use_cache,
        spec_sha256=spec_sha256,
        profile_steps=profile_steps,
    )
    _remember(context, status="running")
    return context


def _identity(spec_sha256: str, *, use_cache: bool) -> str:
    return digest_of({"spec": spec_sha256, "use_cache": use_cache})


def _remember(context: RunContext, *, status: str) -> None:
    identity = _identity(context.spec_sha256, use_cache=context.use_cache)
    text = json.dumps({"identity": identity, "run_id": context.run_id, "status": status})
    write_text(join_uri(context.workdir, STATE), text + "\n")


def run_locally(
    spec: PipelineSpec,
    *,
    workdir: str,
    runner: Runner,
    use_cache: bool,
    profile_steps: int = 0,
    watch: Callable[[RunContext, threading.Event], None],
    on_line: Callable[[str], None],
) -> LocalRun:
    """Compile the pipeline and run it here, stage after stage.

    Args:
        spec: Checked spec.
        workdir: Path or s3:// URI; everything is written below it.
        runner: Host processes, or containers of the spec's image.
        use_cache: Whether finished stages are taken over, if the spec does not forbid it.
        profile_steps: Steps of each training stage that still has some to trace; 0 traces none.
        watch: Called on this thread while the pipeline runs; returns when the event is set.
        on_line: Called with every line that a stage prints.

    Raises:
        WorkdirError: The work directory cannot be used.
        TrackingUnreachable: The tracking server does not answer.
        ValueError: No Docker engine answers, or it does not have the image.
    """
    workdir = workdir.rstrip("/") if is_remote(workdir) else str(Path(workdir).resolve())
    root = local_path(workdir)
    check_reachable(spec.tracking.uri)
    with claimed_workdir(workdir):
        chosen = _docker_runner(spec, root) if runner == "docker" else _host_runner()
        context = context_for(
            spec, workdir=workdir, use_cache=use_cache, profile_steps=profile_steps
        )
        package = root / "pipeline.yaml"
        compile_pipeline(spec, context=context.model_dump_json(), path=package, on_cluster=False)
        tracker = Tracker(context)
        parent = tracker.parent()
        tracker.open(parent).log_params(json.loads(spec.model_dump_json()))
        log = root / "logs" / f"{context.run_id}.log"
        delete(join_uri(workdir, RESULT))
        started = time.monotonic()
        ended = _execute(package, chosen, context, log=log, watch=watch, on_line=on_line)
        with contextlib.suppress(*TRACKING_ERRORS):  # it may have died since
            tracker.end_parent(MLFLOW_STATUS[ended])
        upload(log, context.uri_of(log))
        _remember(context, status=ended)
        if ended == "interrupted":
            raise KeyboardInterrupt
        return LocalRun(
            context=context,
            succeeded=ended == "succeeded",
            seconds=time.monotonic() - started,
            parent_run_id=parent,
            log=log,
        )


def _execute(
    package: Path,
    runner: local.SubprocessRunner | local.DockerRunner,
    context: RunContext,
    *,
    log: Path,
    watch: Callable[[RunContext, threading.Event], None],
    on_line: Callable[[str], None],
) -> Ending:
    """Run the package on a thread of its own while this one watches; how it ended.

    An interrupt reaches the stages too: they are given the time to write a checkpoint.
    """
    shutil.rmtree(context.progress_directory, ignore_errors=True)
    local.init(runner=runner, pipeline_root=str(context.root / "kfp"), raise_on_error=False)
    pipeline = components.load_component_from_file(str(package))
    ended = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            pipeline()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirected(file, on_line):
        thread = threading.Thread(target=work, name="pipeline", daemon=True)
        thread.start()
        interrupted = False
        try:
            watch(context, ended)
        except KeyboardInterrupt:
            interrupted = True
            if isinstance(runner, local.DockerRunner):
                _interrupt_containers(context.root, until=ended)
        ended.wait()
        thread.join()
        for failure in failures:
            file.write(f"{type(failure).__name__}: {failure}\n")
    last = read_progress(context.progress_directory, STAGES[-1])
    if last is not None and last.state in ("succeeded", "cached") and not failures:
        return "succeeded"
    return "interrupted" if interrupted else "failed"


class _Tee(io.TextIOBase):
    """A standard output that goes to a log, and line by line to a function."""

    def __init__(self, file: io.TextIOBase, on_line: Callable[[str], None]) -> None:
        self._file = file
        self._on_line = on_line
        self._rest = ""
        self._is_stage = False

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, text: str) -> int:
        """Log the text, and hand on every line that a stage printed."""
        self._file.write(text)
        self._file.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if STAGE_STARTS in line:
                self._is_stage = True
            elif STAGE_ENDS in line:
                self._is_stage = False
            elif self._is_stage and line.strip():
                self._on_line(line.removeprefix("    "))
        return len(text)


@contextlib.contextmanager
def redirected(file: io.TextIOBase, on_line: Callable[[str], None]) -> Iterator[None]:
    """Send what Kubeflow prints to a log instead of the screen."""
    with contextlib.redirect_stdout(_Tee(file, on_line)):
        yield


def _host_runner() -> local.SubprocessRunner:
    """Host processes, for container components too.

    Kubeflow's own refuses container components and replaces `python3` anywhere in a command,
    in paths and settings as well; here only the program itself is replaced.
    """
    handler = subprocess_task_handler
    handler.SubprocessTaskHandler.validate_not_container_component = lambda *_: None
    handler.SubprocessTaskHandler.validate_image = lambda *_: None
    handler.replace_python_executable = _with_this_python
    os.environ["DINOPIPE_DIE_WITH_PARENT"] = "1"
    os.environ.update(COMPUTING | os.environ)
    return local.SubprocessRunner(use_venv=False)


def _with_this_python(command: list[str], executable: str) -> list[str]:
    return [executable, *command[1:]] if command[0] == "python3" else command


def _docker_runner(spec: PipelineSpec, workdir: Path) -> local.DockerRunner:
    """Containers of the spec's image that see the work directory and the data.

    Raises:
        ValueError: No engine answers, or it does not have the image.
    """
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise ValueError(
            f"no Docker engine answers ({error}); start one, set DOCKER_HOST, or leave out "
            f"--runner docker"
        ) from error
    try:
        client.images.get(spec.image)
    except docker.errors.ImageNotFound as error:
        raise ValueError(
            f"the Docker engine has no image {spec.image}; docker build -t {spec.image} ."
        ) from error
    finally:
        client.close()
    mounts = [docker.types.Mount(place, place, type="bind") for place in _writable(workdir)]
    mounts += [
        docker.types.Mount(place, place, type="bind", read_only=True)
        for place in sorted({fixed_part(place) for place in spec.local_places})
    ]
    passed = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "MLFLOW_TRACKING_"))}
    return local.DockerRunner(
        mounts=mounts,
        labels={WORKDIR_LABEL: str(workdir)},
        user=f"{os.getuid()}:{os.getgid()}",
        shm_size="1g",
        init=True,  # a first process of its own drops signals until it handles them
        environment={"HOME": "/tmp", CACHE_VARIABLE: str(cache_directory()), **passed},
    )


def _writable(root: Path) -> list[str]:
    """What containers write to: the work directory, or all of the spool that it lies in."""
    return [str(cache_directory() if root.is_relative_to(cache_directory()) else root)]


def _interrupt_containers(workdir: Path, *, until: threading.Event) -> None:
    """Pass an interrupt on, once to each container: no terminal does it for them."""
    told: set[str] = set()
    with contextlib.closing(docker.from_env()) as client:
        while not until.wait(0.5):
            for container in client.containers.list(
                filters={"label": f"{WORKDIR_LABEL}={workdir}"}
            ):
                if container.id not in told:
                    told.add(container.id)
                    with contextlib.suppress(docker.errors.APIError):  # it has just ended
                        container.kill("SIGINT")
