from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.runtime.processes import exclusive_directory
from dinov2_core.errors import InputError

CHILD = (
    "import time; from components.runtime.processes import die_with_parent; die_with_parent(); "
    "print('ready', flush=True); time.sleep(60)"
)
PARENT = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {CHILD!r}]); print(p.pid, flush=True); p.wait()"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_child_ends_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline().strip() == "ready"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_a_directory_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        exclusive_directory(tmp_path / "d"),
        pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
        exclusive_directory(tmp_path / "d"),
    ):
        pass
    with exclusive_directory(tmp_path / "d"):
        pass
