"""starting_weights: a file comes from wherever it is named, or a sentence says why not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import mlflow
import pytest
import torch
from moto.server import ThreadedMotoServer
from pydantic import ValidationError
from safetensors.torch import load_file

from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.starting_weights import download_weights
from dinov2_core.config.training import HeadWarmup
from dinov2_core.errors import InputError, TrackingRefused
from tests.components.teachers import random_checkpoint


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="weights")
    yield
    server.stop()


def downloaded(source: str, directory: Path, tracking_uri: str = "") -> Path:
    return download_weights(source, directory=directory, tracking_uri=tracking_uri)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    assert downloaded(str(path), tmp_path / "downloads") == path
    assert not (tmp_path / "downloads").exists()
    folder = tmp_path / "dinov2-small"
    folder.mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors named by initial_weights do not ex"):
        downloaded(str(folder), tmp_path / "downloads")
    (folder / "model.safetensors").write_bytes(b"weights")
    assert downloaded(str(folder), tmp_path / "downloads") == folder / "model.safetensors"
    with pytest.raises(InputError, match="named by initial_weights do not exist"):
        downloaded("/absent", tmp_path)


def test_an_object_is_downloaded_once_for_each_content(s3: None, tmp_path: Path) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket="weights", Key="a/model.pth", Body=b"one")
    path = downloaded("s3://weights/a/model.pth", tmp_path)
    assert path.read_bytes() == b"one"
    assert path.suffix == ".pth"
    modified = path.stat().st_mtime_ns
    assert downloaded("s3://weights/a/model.pth", tmp_path) == path
    assert path.stat().st_mtime_ns == modified
    client.put_object(Bucket="weights", Key="a/model.pth", Body=b"two")
    assert downloaded("s3://weights/a/model.pth", tmp_path).read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(InputError, match="S3 answered 404 for s3://weights/b"):
        downloaded("s3://weights/b", tmp_path)


def test_a_registered_teacher_gives_its_backbone(context: RunContext, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "teacher")
    uri = context.resolved_tracking_uri
    register(Path(checkpoint.teacher_uri), name="m", tracking_uri=uri, folder=tmp_path)
    downloads = tmp_path / "downloads"
    path = downloaded("models:/m@champion", downloads, uri)
    assert path == downloaded("models:/m/1", downloads, uri)
    assert list(downloads.iterdir()) == [path]
    teacher = load_file(checkpoint.teacher_uri)
    assert torch.equal(
        load_file(path)["dino_head.last_layer.weight_v"], teacher["dino_head.last_layer.weight_v"]
    )
    with pytest.raises(TrackingRefused, match="models:/other@champion is not in sqlite"):
        downloaded("models:/other@champion", downloads, uri)
    register(None, name="plain", tracking_uri=uri, folder=tmp_path)
    with pytest.raises(InputError, match="no teacher that dinopipe registered"):
        downloaded("models:/plain@champion", downloads, uri)


def test_a_model_that_names_a_file_outside_of_itself_leaves_it_alone(
    context: RunContext, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.safetensors"
    checkpoint = random_checkpoint(tmp_path / "teacher")
    secret.write_bytes(Path(checkpoint.teacher_uri).read_bytes())
    uri = context.resolved_tracking_uri
    register(secret, name="forged", tracking_uri=uri, folder=tmp_path)
    (model,) = (tmp_path / "artifacts").rglob("MLmodel")
    text = model.read_text()
    assert "path: artifacts/secret.safetensors" in text
    model.write_text(text.replace("path: artifacts/secret.safetensors", f"path: {secret}"))
    with pytest.raises(InputError, match="as its weights, which is no file of the model"):
        downloaded("models:/forged@champion", tmp_path / "downloads", uri)
    assert secret.exists()
    assert not list((tmp_path / "downloads").iterdir())


def register(weights: Path | None, *, name: str, tracking_uri: str, folder: Path) -> None:
    """A model version with the artifacts of a teacher, or without."""
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    config = folder / "teacher.json"
    config.write_text("{}")
    client = mlflow.MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    found = client.get_experiment_by_name(name)
    place = (folder / "artifacts").as_uri()
    experiment = found.experiment_id if found else client.create_experiment(name, place)
    with mlflow.start_run(experiment_id=experiment):
        mlflow.pyfunc.log_model(
            name="teacher",
            python_model=str(_plain_code(folder)),
            artifacts={"weights": str(weights), "config": str(config)} if weights else {},
            pip_requirements=["mlflow"],
            registered_model_name=name,
        )
    client.set_registered_model_alias(name, "champion", "1")


def _plain_code(folder: Path) -> Path:
    path = folder / "plain.py"
    path.write_text(
        "import mlflow\n"
        "class Plain(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input: list[str]):\n"
        "        return model_input\n"
        "mlflow.models.set_model(Plain())\n"
    )
    return path


class Hub(BaseHTTPRequestHandler):
    """The Hugging Face Hub with one file."""

    def do_HEAD(self) -> None:
        is_there = self.path == "/timm/vit.tag/resolve/main/model.safetensors"
        is_busy = "busy" in self.path  # 507: the Hub's client has no retries for it
        self.send_response(200 if is_there else 507 if is_busy else 404)
        if is_there:
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "c" * 40)
        elif not is_busy:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "7" if is_there else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"weights")

    def log_message(self, *_: object) -> None:
        pass


DOWNLOAD = """
import sys
from pathlib import Path
from components.train.starting_weights import download_weights
from dinov2_core.errors import DinopipeError
for name in sys.argv[2:]:
    try:
        print(download_weights(name, directory=Path(sys.argv[1]), tracking_uri="").read_text())
    except DinopipeError as error:
        print(type(error).__name__, error)
"""


def test_a_network_of_timm_comes_from_the_hub_or_says_why_not(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    names = ["timm:vit.tag", "timm:absent.tag", "timm:busy.tag"]
    command = [sys.executable, "-c", DOWNLOAD, str(tmp_path), *names]
    answer = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    server.shutdown()
    server.server_close()
    found, absent, busy = answer.stdout.splitlines()
    assert found == "weights"
    assert absent.startswith("InputError initial_weights timm:absent.tag cannot be downloaded")
    assert "from the Hugging Face Hub (Rep" in absent
    assert busy.startswith("TransientError initial_weights timm:busy.tag cannot be downloaded")
    offline = subprocess.run(
        [*command[:4], "timm:other.tag"],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "InputError initial_weights timm:other.tag cannot be downloaded" in offline.stdout
    assert "check the name with its tag, and the network" in offline.stdout


@pytest.mark.parametrize(
    "source", ["http://host/w.pth", "timm:vit_small_patch14_dinov2", "models:/m", "s3://b/"]
)
def test_addresses_of_another_form_are_refused(stage: TrainStage, source: str) -> None:
    values = stage.model_copy(update={"initial_weights": source})
    with pytest.raises(ValidationError, match="is neither a path nor of the form s3://BUCKET/KEY"):
        TrainStage.model_validate_json(values.model_dump_json())


@pytest.mark.parametrize(
    "source",
    ["", "teacher.pth", "s3://b/k.pth", "timm:vit.lvd142m", "models:/m@champion", "models:/m/3"],
)
def test_addresses_of_a_known_form_are_taken(stage: TrainStage, source: str) -> None:
    values = stage.model_copy(update={"initial_weights": source})
    assert TrainStage.model_validate_json(values.model_dump_json()) == values


def test_a_head_warmup_needs_weights(stage: TrainStage) -> None:
    learning = stage.learning.model_copy(update={"head_warmup": HeadWarmup(num_steps=2)})
    values = stage.model_copy(update={"learning": learning})
    with pytest.raises(ValidationError, match="set initial_weights, or leave head_warmup out"):
        TrainStage.model_validate_json(values.model_dump_json())
    values = values.model_copy(update={"initial_weights": "w.pth"})
    assert TrainStage.model_validate_json(values.model_dump_json()) == values
