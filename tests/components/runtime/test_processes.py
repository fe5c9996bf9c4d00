"""processes: children end with their parent, and a directory has one user at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from components.runtime.processes import exclusive_directory

PARENT = """
import subprocess, sys
child = "from components.runtime.processes import die_with_parent; import sys, time; "
child += "die_with_parent(); print('ready', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
process.wait()
"""


def test_a_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _gone, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "stage"
    with exclusive_directory(directory):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}; wait for that"):
            exclusive_directory(directory).__enter__()
        assert (directory / "lock").read_text() == str(os.getpid())
    with exclusive_directory(directory):
        pass


def test_the_lock_lasts_as_long_as_a_process_that_inherited_it(tmp_path: Path) -> None:
    with exclusive_directory(tmp_path) as lock:
        heir = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
    with pytest.raises(ValueError, match="in use"), exclusive_directory(tmp_path):
        pass
    heir.communicate(b"\n")
    with exclusive_directory(tmp_path):
        pass
