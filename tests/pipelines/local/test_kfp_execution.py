"""Kubeflow's local execution with stages that are one line of Python."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kfp import compiler, dsl

from pipelines.local.kfp_execution import HostProcesses, logged, run_package
from tests.pipelines.specs import REPOSITORY


@dsl.container_component
def stage(code: str, argument: str) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(image="none", command=["python3", "-c"], args=[code, argument])


def package_of(folder: Path, *codes: str, argument: str = "") -> Path:
    """A pipeline of stages, one after another."""

    @dsl.pipeline(name="lines")
    def lines() -> None:
        earlier = None
        for code in codes:
            task = stage(code=code, argument=argument)
            if earlier is not None:
                task.after(earlier)
            earlier = task

    path = folder / "package.yaml"
    compiler.Compiler().compile(lines, package_path=str(path))
    return path


def lines_of(package: Path, runner: HostProcesses, on_line: Callable[[str], None]) -> list[str]:
    """Run a package; gives what its stages print, and calls `on_line` with each of it."""
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        on_line(line)

    with logged(io.StringIO(), keep):
        run_package(package, runner=runner.kfp_runner, root=package.parent / "kfp")
    return lines


def test_a_stage_gets_this_python_and_its_arguments_as_they_are(tmp_path: Path) -> None:
    code = "import sys; print(sys.executable); print('    in', sys.argv[1])"
    package = package_of(tmp_path, code, argument="/opt/python3/pile")
    lines = lines_of(package, HostProcesses(), lambda _: None)
    assert lines == [sys.executable, "    in /opt/python3/pile"]


def test_output_that_is_not_text_does_not_end_a_run(tmp_path: Path) -> None:
    code = r"import sys; sys.stdout.buffer.write(b'\xff\n'); print('next')"
    assert lines_of(package_of(tmp_path, code), HostProcesses(), lambda _: None) == ["�", "next"]


INTERRUPTED = """
import signal, time
count = []
signal.signal(signal.SIGINT, lambda *_: count.append(1))
print('ready', flush=True)
while not count: time.sleep(0.01)
time.sleep(0.3)
print('interrupted', len(count))
"""


def test_an_interrupt_reaches_the_running_stage_once_and_no_other_is_started(
    tmp_path: Path,
) -> None:
    """Also where the program was started by a shell that has it ignore interrupts."""
    runner = HostProcesses()

    def interrupt_twice(line: str) -> None:
        if line == "ready":
            runner.interrupt()
            runner.interrupt()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        package = package_of(tmp_path, INTERRUPTED, "print('second')")
        lines = lines_of(package, runner, interrupt_twice)
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines == ["ready", "interrupted 1"]


def test_a_stage_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    runner = HostProcesses()
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"

    def kill(_: str) -> None:
        runner.interrupt()
        threading.Timer(0.1, runner.kill).start()

    started = time.monotonic()
    assert lines_of(package_of(tmp_path, code), runner, kill) == ["1"]
    assert time.monotonic() - started < 60


PARENT = """
import sys
from pipelines.local.kfp_execution import HostProcesses
code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
HostProcesses()._run(["python3", "-c", code])
"""


def test_a_stage_dies_with_its_parent_from_its_first_instruction_on(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}
    )
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text() != "")
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(int(pid.read_text())))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def test_lines_of_stages_are_told_from_those_of_kubeflow() -> None:
    file, lines = io.StringIO(), []
    with logged(file, lines.append):
        for text in (
            "12:00:00 - INFO - Executing task\n", "12:00:00 - INFO - Streamed logs:\n\n",
            "    half", " a line\n    \n      indented\n",
            "12:00:01 - INFO - Task finished with status SUCCESS\n", "------\n",
        ):  # fmt: skip
            sys.stdout.write(text)
    assert lines == ["half a line", "  indented"]
    assert "Executing task" in file.getvalue()
