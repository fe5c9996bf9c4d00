"""Kubeflow's local execution, and all that depends on private names of kfp 2.17."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

from kfp import components, local
from kfp.local import docker_task_handler, subprocess_task_handler

from components.runtime.processes import COMPUTING, die_with_parent

STAGE_STARTS, STAGE_ENDS = "Streamed logs:", "finished with status"
"""Lines of Kubeflow's log before and after those of a stage."""
INDENT = "    "
"""Before every line of a stage."""
NOT_STARTED = 1
"""Exit code of a stage that was not started because the run is being stopped."""

KfpRunner: TypeAlias = local.SubprocessRunner | local.DockerRunner


class HostProcesses:
    """Runs every stage as a process of this machine, in a session of its own.

    Kubeflow's own runner refuses container components, replaces `python3` anywhere in a command,
    in paths and settings as well, and leaves interrupts to the terminal.
    """

    def __init__(self) -> None:
        self.kfp_runner: KfpRunner = local.SubprocessRunner(use_venv=False)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._is_stopping = False
        handler = subprocess_task_handler
        handler.SubprocessTaskHandler.validate_not_container_component = lambda *_: None
        handler.SubprocessTaskHandler.validate_image = lambda *_: None
        handler.replace_python_executable = lambda command, _: command
        handler.run_local_subprocess = self._run

    def interrupt(self) -> None:
        """Send the running stage SIGINT, once, and start no other; may be called repeatedly."""
        with self._lock:
            if self._process is not None and not self._is_stopping:
                self._process.send_signal(signal.SIGINT)
            self._is_stopping = True

    def kill(self) -> None:
        """Kill the running stage; its ranks die with it."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Run a stage to its end, with its output on ours; gives the exit code."""
        program, *arguments = full_command
        with self._lock:
            if self._is_stopping:
                return NOT_STARTED
            self._process = process = subprocess.Popen(
                [sys.executable if program == "python3" else program, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=COMPUTING | os.environ | (env_vars or {}),
                start_new_session=True,  # a terminal's Ctrl-C reaches it through `interrupt` alone
                preexec_fn=partial(_set_up_stage_process, os.getpid()),
            )
        with process:
            for line in process.stdout or ():
                sys.stdout.write(INDENT + line)
        with self._lock:
            self._process = None
        return process.returncode


def _set_up_stage_process(parent: int) -> None:
    """Before a stage's program: end with the parent, and hear interrupts even if it does not."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(NOT_STARTED)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_containers_if(allowed: Callable[[], bool]) -> None:
    """Let Kubeflow start the container of a stage only while this is allowed."""
    run_container = docker_task_handler.run_docker_container

    def run_if_allowed(**arguments: object) -> int:
        return int(run_container(**arguments)) if allowed() else NOT_STARTED

    docker_task_handler.run_docker_container = run_if_allowed


def run_package(package: Path, *, runner: KfpRunner, root: Path) -> None:
    """Run a compiled pipeline, stage after stage, until one fails.

    Args:
        package: Intermediate representation.
        runner: Runs the stages.
        root: Directory for the files that Kubeflow hands from stage to stage.
    """
    local.init(runner=runner, pipeline_root=str(root), raise_on_error=False)
    components.load_component_from_file(str(package))()


class _Tee(io.TextIOBase):
    """A standard output that goes to a log, and lines of stages to a function as well."""

    def __init__(self, file: io.TextIOBase, on_line: Callable[[str], None]) -> None:
        self._file = file
        self._on_line = on_line
        self._rest = ""
        self._is_stage = False

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, text: str) -> int:
        """Log the text, and pass on every line that a stage printed."""
        self._file.write(text)
        self._file.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if STAGE_STARTS in line:
                self._is_stage = True
            elif STAGE_ENDS in line:
                self._is_stage = False
            elif self._is_stage and line.strip():
                self._on_line(line.removeprefix(INDENT))
        return len(text)


@contextlib.contextmanager
def logged(file: io.TextIOBase, on_line: Callable[[str], None]) -> Iterator[None]:
    """Write what Kubeflow prints to a log, and pass on the lines of stages."""
    with contextlib.redirect_stdout(_Tee(file, on_line)):
        yield
