"""MLflow's model registry: registers teachers as model versions, and downloads their files."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.utils.logging_utils import disable_logging
from numpy.typing import NDArray

from components.runtime.mlflow_requests import ask_mlflow, connected_client, is_absent
from components.runtime.system_facts import package_version
from components.runtime.tracking import StageRun
from components.runtime.uris import without_password
from dinov2_core.errors import InputError, TrackingRefused

REQUIREMENTS = ("mlflow", "torch", "safetensors", "pillow", "numpy", "pandas")
"""What a consumer needs to run a registered teacher."""
MODEL_TAGS = {"mlflow.user": "dinopipe"}
"""MLflow would write the name that it signs in with."""
METRIC_TAG = "dinopipe.gate_metric"
VALUE_TAG = "dinopipe.gate_value"
EVALUATION_TAG = "dinopipe.evaluation_sha256"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """A model version in the registry."""

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
            TrackingUnavailable, TrackingRefused: The registry does not answer, or refuses; that is
                not the same as no version.
        """
        client = self.run.client
        try:
            model = self._ask(lambda: client.get_registered_model(self.model_name))
        except TrackingRefused as error:
            if is_absent(error):
                return None
            raise
        if alias not in model.aliases:
            return None
        found = self._ask(lambda: client.get_model_version_by_alias(self.model_name, alias))
        return RegisteredVersion(version=int(found.version), tags=dict(found.tags))

    def add(
        self,
        *,
        code: Path,
        package: Path,
        weights: Path,
        config: Path,
        example: bytes,
        documents: dict[str, Path],
        metrics: dict[str, float],
    ) -> RegisteredVersion:
        """Log a teacher as a model of the stage's run and register it as a new version.

        A version that this run made in an earlier attempt is given instead.

        Args:
            code: File that MLflow runs to load the model.
            package: Directory of the Python package that it imports.
            weights: Safetensors file of the backbone.
            config: JSON with architecture and preprocessing.
            example: An image file, kept as the input example.
            documents: Further files kept beside the weights, by name.
            metrics: Logged on the model, so that versions can be searched by them.
        """
        _use_server(self.run.tracking_uri)
        disable_logging()  # type: ignore[no-untyped-call]
        params = [ParamSpec("batch_size", "long", 64), ParamSpec("output", "string", "cls")]
        signature = ModelSignature(
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
            params=ParamSchema(params),
        )

        def find_or_log() -> int:
            made = self._own_version()
            if made is not None:
                return made
            with _importable(package), mlflow.start_run(run_id=self.run.run_id):
                logged = mlflow.pyfunc.log_model(
                    name="teacher",
                    python_model=str(code),
                    code_paths=[str(package)],
                    artifacts={
                        "weights": str(weights),
                        "config": str(config),
                        **{name: str(path) for name, path in documents.items()},
                    },
                    signature=signature,
                    input_example=pd.DataFrame({"image": [base64.b64encode(example).decode()]}),
                    pip_requirements=[f"{name}=={package_version(name)}" for name in REQUIREMENTS],
                    registered_model_name=self.model_name,
                    tags=MODEL_TAGS,
                )
                if metrics:
                    mlflow.log_metrics(metrics, model_id=logged.model_id)
            return int(logged.registered_model_version)

        version = self._ask(find_or_log)
        self.run.keep_open()
        return RegisteredVersion(version=version, tags={})

    def decide(self, version: int, *, alias: str, tags: dict[str, str]) -> None:
        """Store a decision as tags of a version, then point the alias at it."""
        client, name = self.run.client, self.model_name

        def store() -> None:
            for key, value in tags.items():
                client.set_model_version_tag(name, str(version), key, value)
            client.set_registered_model_alias(name, alias, str(version))

        self._ask(store)

    def _own_version(self) -> int | None:
        """The newest version that this run made, whose answer may have been lost."""
        found = self.run.client.search_model_versions(f"run_id = '{self.run.run_id}'")
        return max((int(v.version) for v in found if v.name == self.model_name), default=None)

    def _ask(self, call: Callable[[], _T]) -> _T:
        return ask_mlflow(call, uri=self.run.tracking_uri)


@contextmanager
def _importable(package: Path) -> Iterator[None]:
    """MLflow runs the model's file before it has copied the package that the file imports."""
    before = list(sys.path)
    sys.path.insert(0, str(package.parent))
    try:
        yield
    finally:
        sys.path[:] = before


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFiles:
    """A registered teacher on this machine."""

    weights: Path
    """Safetensors file of the backbone."""
    config: Path
    """JSON with architecture and preprocessing."""


def download_model(model_uri: str, *, tracking_uri: str, directory: Path) -> Path:
    """Copy the files of a registered model, whoever made it; nothing of it is run.

    Args:
        model_uri: Such as `models:/NAME@champion`.
        tracking_uri: Server or store that holds the model.
        directory: Made if it is missing; gets the files.

    Returns:
        The model's root, below the directory.

    Raises:
        TrackingUnavailable: The server does not answer.
        TrackingRefused: There is no such model, or it may not be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    connected_client(tracking_uri)
    _use_server(tracking_uri)
    try:
        return Path(
            ask_mlflow(
                lambda: mlflow.artifacts.download_artifacts(model_uri, dst_path=str(directory)),
                uri=tracking_uri,
            )
        )
    except TrackingRefused as error:
        raise TrackingRefused(
            f"model {model_uri} is not in {without_password(tracking_uri)} ({error}); check the "
            "name, the alias and the tracking URI (--tracking-uri, or tracking.uri in a spec)",
            status=error.status,
        ) from error


def _use_server(tracking_uri: str) -> None:
    """Let MLflow's module-level functions talk to a server or store."""
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)


def teacher_files(root: Path, *, model_uri: str) -> TeacherFiles | None:
    """The files of a teacher in a downloaded model; None where it is another kind of model.

    Args:
        root: From `download_model`.
        model_uri: For messages.

    Raises:
        InputError: The model names a file outside of itself, or one that it lacks.
    """
    try:
        artifacts = Model.load(str(root)).flavors["python_function"]["artifacts"]
        named = {name: str(artifacts[name]["path"]) for name in ("weights", "config")}
    except (MlflowException, KeyError, TypeError):
        return None
    paths = {name: (root / path).resolve() for name, path in named.items()}
    for name, path in paths.items():
        if not path.is_relative_to(root.resolve()) or not path.is_file():
            raise InputError(
                f"model {model_uri} names {named[name]} as its {name}, which is no file of the "
                "model; do not use it, and register the teacher again"
            )
    return TeacherFiles(**paths)


def download_teacher(model_uri: str, *, tracking_uri: str, directory: Path) -> TeacherFiles:
    """Copy the files of a registered teacher into a directory.

    Args:
        model_uri: Such as `models:/NAME@champion`.
        tracking_uri: Server or store that holds the model.
        directory: Gets the model's files; the paths returned are below it.

    Raises:
        TrackingUnavailable: The server does not answer.
        InputError: There is no such model, or it is no teacher of this program.
    """
    root = download_model(model_uri, tracking_uri=tracking_uri, directory=directory)
    files = teacher_files(root, model_uri=model_uri)
    if files is None:
        raise InputError(
            f"model {model_uri} has no artifacts `weights` and `config`, so it is no teacher that "
            "dinopipe registered; name another model"
        )
    return files


def load_trusted(root: Path) -> Callable[[list[bytes]], NDArray[np.float32]]:
    """Any downloaded model as a function from image files to embeddings [B, D]; runs its code.

    Args:
        root: From `download_model`.

    Raises:
        InputError: The model does not load.
    """
    try:
        model = mlflow.pyfunc.load_model(str(root))
    except MlflowException as error:
        raise InputError(f"the model does not load: {error.message}") from error
    return lambda images: np.asarray(model.predict(images), np.float32)
