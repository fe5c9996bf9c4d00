"""A Docker engine for the tests that need one: the machine's own, or one out of Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import docker

BASE = "python:3.11-slim-bookworm"
PACKAGES = ("docker.io", "debootstrap")
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
PLACE = Path(tempfile.gettempdir()) / "dinopipe-docker"
"""Kept, so that a second call finds the layers of the first."""


class NoEngine(Exception):
    """No engine answers and none can be started; the message says why."""


@contextmanager
def docker_engine() -> Iterator[docker.DockerClient]:
    """A client of an engine that has a Python image; DOCKER_HOST is set meanwhile."""
    with _engine() as client:
        with suppress(docker.errors.APIError):  # no registry: the image is made below
            if not client.images.list(BASE):
                client.images.pull(BASE)
        if not client.images.list(BASE):
            _make_python_image(client)
        yield client
        client.close()


def build_image(tag: str, folder: Path, **arguments: str) -> str:
    """Build a folder's Dockerfile; returns the tag.

    BuildKit makes only the stages that are needed. Debian's client has it built in, where another
    one found first may not.
    """
    client = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
    settings = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    ended = subprocess.run(
        [client, "build", "-q", "-t", tag, *settings, str(folder)],
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return tag


@contextmanager
def _engine() -> Iterator[docker.DockerClient]:
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException:
        with _own_engine() as address:
            os.environ["DOCKER_HOST"] = address
            try:
                yield docker.from_env(timeout=3600)
            finally:
                del os.environ["DOCKER_HOST"]
    else:
        yield client


@contextmanager
def _own_engine() -> Iterator[str]:
    """Docker of Debian on a socket and in a directory of its own."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoEngine("no Docker engine answers, and one can be installed only by root on Debian")
    if not all(map(shutil.which, ("dockerd", "debootstrap"))):
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES)
    PLACE.mkdir(exist_ok=True)
    address = f"unix://{PLACE}/docker.sock"
    command = ["dockerd", "--data-root", PLACE / "data", "--exec-root", PLACE / "exec"]
    command += ["--pidfile", PLACE / "pid", "--host", address]
    # raising limits above these is refused where the machine is a container itself
    command += ["--default-ulimit", "nofile=20000:20000", "--default-ulimit", "nproc=16384:16384"]
    with (PLACE / "log").open("w") as log:
        daemon = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
    try:
        _wait_for(daemon, PLACE / "docker.sock")
        yield address
    finally:
        daemon.terminate()
        daemon.wait(60)


def _wait_for(daemon: subprocess.Popen[bytes], socket: Path) -> None:
    for _ in range(60):
        with suppress(docker.errors.DockerException):
            docker.DockerClient(f"unix://{socket}").ping()
            return
        if daemon.poll() is not None:
            break
        time.sleep(1)
    last = (socket.parent / "log").read_text().splitlines()[-5:]
    raise NoEngine("dockerd does not start:\n" + "\n".join(last))


def _make_python_image(client: docker.DockerClient) -> None:
    """The base image out of Debian's packages, with this machine's certificates and index."""
    with tempfile.TemporaryDirectory(dir=PLACE if PLACE.exists() else None) as folder:
        root = Path(folder) / "root"
        include = "--include=python3,python3-venv,ca-certificates"
        _run("debootstrap", "--variant=minbase", include, "bookworm", str(root))
        shutil.copy("/" / CERTIFICATES, root / CERTIFICATES)
        settings = {"cert": f"/{CERTIFICATES}", "index-url": os.environ.get("PIP_INDEX_URL", "")}
        lines = [f"{name} = {value}" for name, value in settings.items() if value]
        (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        archive = Path(folder) / "root.tar"
        _run("tar", "-C", str(root), "-cf", str(archive), ".")
        repository, tag = BASE.split(":")
        client.api.import_image_from_file(str(archive), repository=repository, tag=tag)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        said = (ended.stdout + ended.stderr).splitlines()[-5:]
        raise NoEngine(
            f"{' '.join(command)} ended with code {ended.returncode}:\n" + "\n".join(said)
        )
