"""MLflow's model registry: teachers go in as model versions, embedders come out."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.utils.logging_utils import disable_logging
from numpy.typing import NDArray

from components.runtime.tracking import StageRun, check_reachable, package_version

REQUIREMENTS = ("mlflow", "torch", "safetensors", "pillow", "numpy", "pandas")
"""What a consumer needs to run a registered teacher."""
MODEL_TAGS = {"mlflow.user": "dinopipe"}
"""MLflow would write the name that it signs in with."""
METRIC_TAG = "dinopipe.gate_metric"
VALUE_TAG = "dinopipe.gate_value"
EVALUATION_TAG = "dinopipe.evaluation_sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """A model version as the registry knows it."""

    version: int
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Registry:
    """Versions and aliases of one registered model."""

    run: StageRun
    model_name: str

    def under_alias(self, alias: str) -> RegisteredVersion | None:
        """The version that an alias points at; None if nothing does.

        Raises:
            MlflowException: The registry does not answer; that is not the same as no version.
        """
        try:
            model = self.run.client.get_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if alias not in model.aliases:
            return None
        found = self.run.client.get_model_version_by_alias(self.model_name, alias)
        return RegisteredVersion(version=int(found.version), tags=dict(found.tags))

    def add(
        self,
        *,
        code: Path,
        weights: Path,
        config: Path,
        example: bytes,
        documents: dict[str, Path],
        metrics: dict[str, float],
    ) -> RegisteredVersion:
        """Log a teacher as a model of the stage's run and register it as a new version.

        Args:
            code: Self-contained file that MLflow runs to load the model.
            weights: Safetensors file of the backbone.
            config: JSON with architecture and preprocessing.
            example: An image file, kept as the input example.
            documents: Further files kept beside the weights, by name.
            metrics: Logged on the model, so that versions can be searched by them.
        """
        mlflow.set_tracking_uri(self.run.tracking_uri)
        mlflow.set_registry_uri(self.run.tracking_uri)
        disable_logging()  # type: ignore[no-untyped-call]
        params = [ParamSpec("batch_size", "long", 64), ParamSpec("output", "string", "cls")]
        with mlflow.start_run(run_id=self.run.run_id):
            logged = mlflow.pyfunc.log_model(
                name="teacher",
                python_model=str(code),
                artifacts={
                    "weights": str(weights),
                    "config": str(config),
                    **{name: str(path) for name, path in documents.items()},
                },
                signature=ModelSignature(
                    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
                    params=ParamSchema(params),
                ),
                input_example=pd.DataFrame({"image": [base64.b64encode(example).decode()]}),
                pip_requirements=[f"{name}=={package_version(name)}" for name in REQUIREMENTS],
                registered_model_name=self.model_name,
                tags=MODEL_TAGS,
            )
            if metrics:
                mlflow.log_metrics(metrics, model_id=logged.model_id)
        self.run.keep_open()
        return RegisteredVersion(version=int(logged.registered_model_version), tags={})

    def decide(self, version: int, *, alias: str, tags: dict[str, str]) -> None:
        """Store a decision as tags of a version, then point the alias at it."""
        client = self.run.client
        for key, value in tags.items():
            client.set_model_version_tag(self.model_name, str(version), key, value)
        client.set_registered_model_alias(self.model_name, alias, str(version))


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFiles:
    """A registered teacher on this machine."""

    weights: Path
    """Safetensors file of the backbone."""
    config: Path
    """JSON with architecture and preprocessing."""


def fetch_teacher(model_uri: str, *, tracking_uri: str, directory: Path) -> TeacherFiles:
    """Bring the files of a registered teacher into a directory.

    Args:
        model_uri: Such as `models:/NAME@champion`.
        tracking_uri: Server or store that holds the model.
        directory: Taken over by the model's files.

    Raises:
        TrackingUnreachable: The server does not answer.
        ValueError: There is no such model, or it is no teacher of this program.
    """
    _connect(tracking_uri)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        root = Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=str(directory)))
        flavor = Model.load(str(root)).flavors.get("python_function", {})
    except MlflowException as error:
        raise _not_there(model_uri, tracking_uri, error) from error
    artifacts = flavor.get("artifacts", {})
    if not {"weights", "config"} <= set(artifacts):
        raise ValueError(
            f"model {model_uri} has no artifacts `weights` and `config`, so it is no teacher that "
            "dinopipe registered; name another model"
        )
    return TeacherFiles(
        weights=root / artifacts["weights"]["path"], config=root / artifacts["config"]["path"]
    )


def _connect(tracking_uri: str) -> None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    check_reachable(tracking_uri)
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)


def _not_there(model_uri: str, tracking_uri: str, error: MlflowException) -> ValueError:
    return ValueError(
        f"model {model_uri} is not in {tracking_uri} ({error.message}); check the name, the "
        f"alias and the tracking URI (--tracking-uri, or tracking.uri in a spec)"
    )


Predict = Callable[[list[bytes], int], NDArray[np.float32]]


def load_embedder(model_uri: str, *, tracking_uri: str) -> Predict:
    """A registered teacher as a function from image files to embeddings [B, D].

    Args:
        model_uri: Such as `models:/NAME@champion`.
        tracking_uri: Server or store that holds the model.

    Raises:
        TrackingUnreachable: The server does not answer.
        ValueError: There is no such model.
    """
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    _connect(tracking_uri)
    try:
        model = mlflow.pyfunc.load_model(model_uri)
    except MlflowException as error:
        raise _not_there(model_uri, tracking_uri, error) from error

    def predict(images: list[bytes], batch_size: int) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = model.predict(images, params={"batch_size": batch_size})
        return embeddings

    return predict
