"""Processes that end together, and directories that one run at a time works in."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2_core.errors import InputError

COMPUTING = {
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": (
        f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}"
    ),
}
"""Environment of processes that compute on a CPU, unless the user sets it otherwise.

Threads that wait by spinning starve others on a busy machine. Memory that malloc gives back after
every large tensor and takes again costs a step an eighth of its time in page faults.
"""
_PR_SET_PDEATHSIG = 1


def die_with_parent(kill_signal: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to signal this process when the one that started it ends, however it ends.

    Elsewhere than on Linux nothing happens.
    """
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (AttributeError, OSError):
        return
    prctl(_PR_SET_PDEATHSIG, int(kill_signal), 0, 0, 0)


@contextmanager
def exclusive_directory(directory: Path) -> Iterator[int]:
    """Hold a directory for this run; gives the lock's file descriptor.

    The lock lasts until every process that inherited the descriptor has ended, and needs no
    cleaning up after a kill.

    Raises:
        InputError: Another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{directory} is in use by process {file.read().strip()}; wait for that run to "
                "end, or end it first"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file.fileno()
