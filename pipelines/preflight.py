"""What can be checked of a spec without starting: do places exist, do labels match."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet

from components.curate.config import TimmEmbedding, TorchScriptEmbedding
from components.runtime.image_sources import open_source
from components.runtime.mlflow_requests import check_reachable
from components.runtime.retry import QUICK, retrying_with
from components.runtime.storage import find_object, is_remote
from components.train.config import is_weights_file, weights_file
from dinov2_core.errors import UserError
from pipelines.spec.pipeline_spec import PipelineSpec
from pipelines.spec.problems import Problem


def check_places(spec: PipelineSpec) -> list[Problem]:
    """Problems with what lies outside the spec: data, labels, weights, tracking server.

    Raises:
        TransientError: The store or the tracking server does not answer.
    """
    with retrying_with(QUICK):
        return _problems(spec)


def _problems(spec: PipelineSpec) -> list[Problem]:
    problems = [
        *_image_problems(spec.images.uri, path="images.uri"),
        *_evaluation_problems(spec),
        *_file_problems(spec),
    ]
    if spec.curate.seed_retrieval is not None:
        problems += _image_problems(
            spec.curate.seed_retrieval.uri, path="curate.seed_retrieval.uri"
        )
    try:
        check_reachable(spec.tracking.uri)
    except UserError as error:
        problems.append(Problem(path="tracking.uri", value=None, message=str(error)))
    return problems


def _image_problems(uri: str, *, path: str) -> list[Problem]:
    try:
        if open_source(uri).objects():
            return []
    except UserError as error:
        return [Problem(path=path, value=None, message=str(error))]
    message = "holds no file; name a folder, a glob pattern or a prefix that holds images"
    return [Problem(path=path, value=uri, message=message)]


def _evaluation_problems(spec: PipelineSpec) -> list[Problem]:
    problems = []
    for i, item in enumerate(spec.evaluation_sets):
        try:
            train, test = (_labels(Path(place)) for place in (item.train, item.test))
        except ValueError as error:
            problems.append(Problem(path=f"evaluation_sets.{i}", value=None, message=str(error)))
            continue
        differing = sorted(train ^ test)
        if differing:
            problems.append(
                Problem(
                    path=f"evaluation_sets.{i}",
                    value=item.name,
                    message=f"has labels that are only in train or only in test: "
                    f"{', '.join(differing[:10])}; give both the same labels",
                )
            )
    return problems


def _labels(place: Path) -> set[str]:
    """Names of the classes of a labelled set.

    Raises:
        ValueError: There is no such set, or it has no labels.
    """
    if place.is_dir():
        labels = {
            folder.name
            for folder in place.iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
        }
        if not labels:
            raise ValueError(f"{place} has no folders; put each class into a folder of its own")
        return labels
    if not place.is_file():
        raise ValueError(
            f"{place} does not exist; name a folder with one folder per class, or a Parquet file"
        )
    columns = parquet.read_schema(place).names
    missing = {"image", "label"} - set(columns)
    if missing:
        raise ValueError(
            f"{place} has columns {', '.join(columns)}; columns `image` and `label` are needed"
        )
    column = parquet.read_table(place, columns=["label"])["label"]
    return {str(label) for label in column.unique().to_pylist()}


def _file_problems(spec: PipelineSpec) -> list[Problem]:
    places: list[tuple[str, str]] = []
    embedding = spec.curate.embedding
    match embedding:
        case TimmEmbedding(weights=str(weights)):
            places.append(("curate.embedding.weights", weights))
        case TorchScriptEmbedding(path=path):
            places.append(("curate.embedding.path", path))
        case _:
            pass
    weights = spec.pretrain.initial_weights
    if is_weights_file(weights):
        places.append(("pretrain.initial_weights", str(weights_file(weights))))
    probe = spec.pretrain.probe
    if probe is not None:
        places += [
            (f"pretrain.probe.{name}", place)
            for name, place in (("train", probe.train), ("test", probe.test))
            if place and not Path(place).is_dir()
        ]
    problems = [
        Problem(path=path, value=place, message="does not exist; name an existing file")
        for path, place in places
        if not Path(place).is_file()
    ]
    if isinstance(embedding, TimmEmbedding):
        problems += _timm_problems(embedding.name, path="curate.embedding.name")
    return [*problems, *_weights_problems(weights)]


def _weights_problems(source: str) -> list[Problem]:
    """Problems with starting weights elsewhere; a registry is asked when the stage starts."""
    path = "pretrain.initial_weights"
    if source.startswith("timm:"):
        return _timm_problems(source.removeprefix("timm:"), path=path)
    try:
        if is_remote(source):
            find_object(source)
    except UserError as error:
        return [Problem(path=path, value=None, message=str(error))]
    return []


def _timm_problems(name: str, *, path: str) -> list[Problem]:
    import timm  # takes seconds, and few specs name a model of it

    is_model: Callable[[str], bool] = timm.is_model
    if is_model(name.split(".")[0]):
        return []
    known = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
    return [
        Problem(
            path=path,
            value=name,
            message=f"is not a model of timm; for example {', '.join(known) or 'resnet50'}",
        )
    ]
