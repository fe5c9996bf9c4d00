"""Runs the stages in containers of the spec's image."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

import docker
from kfp import local

from components.runtime.image_sources.folder import fixed_part
from components.runtime.uris import CACHE_VARIABLE, cache_directory
from dinov2_core.errors import SettingsError
from pipelines.local.kfp_execution import KfpRunner, start_containers_if
from pipelines.spec.pipeline_spec import PipelineSpec

WORKDIR_LABEL = "dinopipe.workdir"
"""Label of a run's containers."""


class DockerContainers:
    """Runs every stage in a container that sees the work directory and the data.

    Args:
        spec: Names the image, and the data that stages read.
        workdir: Directory of this machine.

    Raises:
        SettingsError: No engine answers, or it does not have the image.
    """

    def __init__(self, spec: PipelineSpec, *, workdir: Path) -> None:
        _check_image(spec.image)
        self._label = f"{WORKDIR_LABEL}={workdir}"
        self._interrupted: set[str] = set()
        self._is_stopping = False
        start_containers_if(lambda: not self._is_stopping)
        read_only = {fixed_part(path) for path in spec.local_paths.values()}
        mount = partial(docker.types.Mount, type="bind")
        environment = {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("AWS_", "MLFLOW_TRACKING_"))
        }
        self.kfp_runner: KfpRunner = local.DockerRunner(
            mounts=[
                mount(_writable(workdir), _writable(workdir)),
                *(mount(path, path, read_only=True) for path in sorted(read_only)),
            ],
            labels=dict([self._label.split("=", 1)]),
            user=f"{os.getuid()}:{os.getgid()}",
            shm_size="1g",
            init=True,  # a first process of its own drops signals until it handles them
            environment={"HOME": "/tmp", CACHE_VARIABLE: str(cache_directory()), **environment},
        )

    def interrupt(self) -> None:
        """Send every container SIGINT, once, and start no other; may be called repeatedly."""
        self._is_stopping = True
        self._signal("SIGINT", excepted=self._interrupted)

    def kill(self) -> None:
        """Kill every container."""
        self._signal("SIGKILL", excepted=set())

    def _signal(self, name: str, *, excepted: set[str]) -> None:
        with contextlib.closing(docker.from_env()) as client:
            for container in client.containers.list(filters={"label": self._label}):
                if container.id not in excepted:
                    excepted.add(container.id)
                    with contextlib.suppress(docker.errors.APIError):  # it has just ended
                        container.kill(name)


def _check_image(image: str) -> None:
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise SettingsError(
            f"no Docker engine answers ({error}); start one, set DOCKER_HOST, or leave out "
            f"--runner docker"
        ) from error
    with contextlib.closing(client):
        try:
            client.images.get(image)
        except docker.errors.ImageNotFound as error:
            raise SettingsError(
                f"the Docker engine has no image {image}; docker build -t {image} ."
            ) from error


def _writable(workdir: Path) -> str:
    """What containers write to: the work directory, or all of the cache that it lies in."""
    return str(cache_directory() if workdir.is_relative_to(cache_directory()) else workdir)
