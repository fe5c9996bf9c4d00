"""Two "machines" on this one: network namespaces that a cable joins."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where one node runs."""

    prefix: tuple[str, ...]
    """Put before a command to run it there."""
    address: str
    interface: str


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Two network namespaces; both are this machine's loopback where nobody may make any."""
    names = [f"dp{side}{os.getpid()}" for side in "ab"]
    try:
        _ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        yield [Machine(prefix=(), address="127.0.0.1", interface="lo")] * 2
        return
    try:
        _ip("netns", "add", names[1])
        _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        machines = []
        for host, name in enumerate(names, start=1):
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "addr", "add", f"10.213.7.{host}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            prefix = ("ip", "netns", "exec", name)
            machines.append(Machine(prefix=prefix, address=f"10.213.7.{host}", interface=name))
        yield machines
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
