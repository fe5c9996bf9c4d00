"""MLflow's image, run as the Deployment says: make test-containers."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import requests

from tests.k8s.shipped import SHIPPED, Manifest
from tests.pipelines.engine import BASE, NoEngine, build_image, docker_engine

IMAGE = "mlflow:test"
PASSWORD = secrets.token_urlsafe(16)
USERS = """[mlflow]
default_permission = READ
database_uri = sqlite:////mlflow/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]


def variables(container: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """A container's environment, with ConfigMaps looked up and secrets made up."""
    found = {}
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            (data,) = (
                item["data"] for item in manifests if item["metadata"]["name"] == reference["name"]
            )
            if reference["key"] in data:
                found[variable["name"]] = data[reference["key"]]
        else:
            found[variable["name"]] = variable.get("value", PASSWORD)
    return found


def closed(container: Manifest, manifests: list[Manifest], disk: Path) -> dict[str, Any]:
    """How the engine runs a container that the manifest describes."""
    environment = variables(container, manifests)
    command = [
        re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], part)
        for part in (*container["command"], *container.get("args", ()))
    ]
    return {
        "command": command,
        "environment": environment,
        "read_only": True,
        "tmpfs": {"/tmp": ""},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "mem_limit": container["resources"]["limits"]["memory"].replace("Gi", "g"),
        "volumes": [f"{disk}/data:/mlflow", f"{disk}/users:/etc/mlflow:ro"],
    }


@pytest.fixture(scope="module")
def server(
    installed: dict[str, list[Manifest]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a server after its migrations, both as in the overlay dev-cpu."""
    disk = tmp_path_factory.mktemp("mlflow")
    for part in ("data", "users"):
        (disk / part).mkdir()
        (disk / part).chmod(0o777)
    (disk / "users" / "basic_auth.ini").write_text(USERS)
    manifests = installed["dev-cpu"]
    (pod,) = (
        item["spec"]["template"]["spec"] for item in manifests if item["kind"] == "Deployment"
    )
    try:
        with docker_engine() as engine:
            build_image(IMAGE, SHIPPED / "components" / "mlflow", BASE=BASE)
            (first,), (main,) = pod["initContainers"], pod["containers"]
            engine.containers.run(IMAGE, remove=True, **closed(first, manifests, disk))
            options = closed(main, manifests, disk)
            container = engine.containers.run(
                IMAGE, detach=True, ports={"5000/tcp": ("127.0.0.1", None)}, **options
            )
            try:
                yield address_of(container)
            finally:
                container.remove(force=True)
    except NoEngine as error:
        pytest.fail(str(error))


def address_of(container: docker.models.containers.Container) -> str:
    """Where the container answers its probe, once it does."""
    for _ in range(180):
        container.reload()
        assert container.status == "running", container.logs().decode()[-2000:]
        port = container.ports["5000/tcp"][0]["HostPort"]
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                return f"http://127.0.0.1:{port}"
        except requests.RequestException:
            time.sleep(1)
    raise AssertionError(container.logs().decode()[-2000:])


@pytest.mark.parametrize(
    ("host", "password", "code"),
    [
        ("mlflow.dinopipe:5000", PASSWORD, 200),
        ("mlflow:5000", PASSWORD, 200),
        ("mlflow.dinopipe:5000", "guess", 401),
        ("mlflow.evil.example:5000", PASSWORD, 403),
    ],
)
def test_it_answers_only_by_its_names_and_to_its_users(
    host: str, password: str, code: int, server: str
) -> None:
    answer = requests.get(
        f"{server}/api/2.0/mlflow/experiments/search",
        params={"max_results": "1"},
        headers={"Host": host},
        auth=("admin", password),
        timeout=60,
    )
    assert answer.status_code == code, answer.text
