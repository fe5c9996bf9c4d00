"""Containers of a run, against a stand-in of Docker's engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from dinov2_core.errors import SettingsError
from pipelines.local.docker_containers import DockerContainers
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.pipelines.specs import small_values, write_spec


class Engine:
    """What the stand-in has, and the signals that it was asked to send."""

    def __init__(self) -> None:
        self.images: set[str] = set()
        self.containers: dict[str, str] = {}
        """Label by id."""
        self.signals: list[tuple[str, str]] = []

    def answer(self, method: str, path: str, query: dict[str, list[str]]) -> tuple[int, object]:
        match [method, *path.strip("/").split("/")[1:]]:
            case ["GET", "images", *name, "json"]:
                known = "/".join(name) in self.images
                return (200, {"Id": "i"}) if known else (404, {"message": "no such image"})
            case ["GET", "containers", "json"]:
                (label,) = json.loads(query["filters"][0])["label"]
                found = [{"Id": name} for name, own in self.containers.items() if own == label]
                return 200, found
            case ["GET", "containers", name, "json"]:
                return 200, {"Id": name}
            case ["POST", "containers", name, "kill"]:
                self.signals.append((name, query["signal"][0]))
                return 204, None
            case _:
                return 200, {"ApiVersion": "1.44"}


@contextmanager
def running(engine: Engine) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            parts = urlsplit(self.path)
            status, content = engine.answer(self.command, parts.path, parse_qs(parts.query))
            body = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = reply  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield f"tcp://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    content = Engine()
    with running(content) as address:
        monkeypatch.setenv("DOCKER_HOST", address)
        yield content


@pytest.fixture
def spec(tmp_path: Path) -> PipelineSpec:
    values = small_values(tmp_path / "pile" / "*.png", image="registry/dinopipe:1")
    return load_spec(write_spec(values, tmp_path / "spec.yaml"))


def test_without_an_engine_the_runner_is_refused(
    spec: PipelineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/socket")
    with pytest.raises(SettingsError, match=r"no Docker engine answers .* leave out --runner"):
        DockerContainers(spec, workdir=tmp_path / "work")


def test_without_the_image_the_runner_is_refused(
    spec: PipelineSpec, tmp_path: Path, engine: Engine
) -> None:
    with pytest.raises(SettingsError, match="docker build -t registry/dinopipe:1 ."):
        DockerContainers(spec, workdir=tmp_path / "work")


def test_containers_of_this_run_are_interrupted_once_and_killed(
    spec: PipelineSpec, tmp_path: Path, engine: Engine
) -> None:
    engine.images.add("registry/dinopipe:1")
    stages = DockerContainers(spec, workdir=tmp_path / "work")
    engine.containers = {
        "mine": f"dinopipe.workdir={tmp_path}/work",
        "other": "dinopipe.workdir=/elsewhere",
    }
    stages.interrupt()
    engine.containers["late"] = engine.containers["mine"]  # it was being started
    stages.interrupt()
    stages.interrupt()
    assert engine.signals == [("mine", "SIGINT"), ("late", "SIGINT")]
    stages.kill()
    assert engine.signals[2:] == [("mine", "SIGKILL"), ("late", "SIGKILL")]


def test_containers_see_the_work_directory_and_the_data_and_credentials(
    spec: PipelineSpec, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.images.add("registry/dinopipe:1")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    monkeypatch.setenv("UNRELATED", "x")
    arguments = DockerContainers(spec, workdir=tmp_path / "work").kfp_runner.container_run_args
    mounts = {mount["Target"]: mount.get("ReadOnly", False) for mount in arguments["mounts"]}
    assert mounts == {str(tmp_path / "work"): False, str(tmp_path / "pile"): True}
    assert arguments["environment"]["AWS_REGION"] == "eu-1"
    assert "UNRELATED" not in arguments["environment"]
