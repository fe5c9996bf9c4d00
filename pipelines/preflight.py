"""What can be checked of a spec before any work: that its inputs exist and belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from components.curate.config import TimmEmbedding, TorchScriptEmbedding
from components.runtime.image_sources.opening import open_source
from components.runtime.retry import QUICK, retrying_with
from components.runtime.uris import is_remote
from components.train.config import is_weights_file, weights_file
from dinov2_core.errors import LabelsMismatch, UserError
from pipelines.spec.pipeline_spec import PipelineSpec
from pipelines.spec.problems import Problem

if TYPE_CHECKING:
    from dinov2_core.evaluation.labelled_set import LabelledSet

MIN_TRAIN_IMAGES = 20
"""A tenth of the train images is held out, see `dinov2_core.evaluation.logistic`."""


def check_inputs(spec: PipelineSpec) -> list[Problem]:
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
        *_probe_problems(spec),
        *_file_problems(spec),
    ]
    if spec.curate.seed_retrieval is not None:
        problems += _image_problems(
            spec.curate.seed_retrieval.uri, path="curate.seed_retrieval.uri"
        )
    if spec.tracking.uri:
        problems += _tracking_problems(spec.tracking.uri)
    return problems


def _tracking_problems(uri: str) -> list[Problem]:
    from components.runtime.mlflow_requests import check_reachable  # MLflow takes seconds to load

    try:
        check_reachable(uri)
    except UserError as error:
        return [Problem(path="tracking.uri", value=None, message=str(error))]
    return []


def _image_problems(uri: str, *, path: str) -> list[Problem]:
    try:
        items = open_source(uri).objects()
    except UserError as error:
        return [Problem(path=path, value=None, message=str(error))]
    if not items:
        message = "holds no file; name a folder, a glob pattern or a prefix that holds images"
    elif all(item.key.endswith(".parquet") for item in items):
        message = f"holds {len(items)} Parquet files and no image; name one Parquet file"
    else:
        return []
    return [Problem(path=path, value=uri, message=message)]


def _evaluation_problems(spec: PipelineSpec) -> list[Problem]:
    problems = []
    for i, one in enumerate(spec.evaluation_sets):
        path = f"evaluation_sets.{i}"
        sets, found = _labelled_sets({"train": one.train, "test": one.test}, path=path)
        problems += found
        if "train" not in sets:
            continue
        num_train = min(len(sets["train"]), spec.evaluate.max_train_images)
        if num_train < MIN_TRAIN_IMAGES:
            message = f"has {num_train} images; label at least {MIN_TRAIN_IMAGES}"
            problems.append(Problem(path=f"{path}.train", value=one.train, message=message))
        too_many = [k for k in spec.evaluate.neighbours if k > num_train]
        if too_many:
            message = f"is more than the {num_train} images of {path}.train; choose fewer"
            problems.append(Problem(path="evaluate.neighbours", value=too_many[0], message=message))
    return problems


def _probe_problems(spec: PipelineSpec) -> list[Problem]:
    probe = spec.pretrain.probe
    if probe is None:
        return []
    uris = {"train": probe.train, "test": probe.test}
    return _labelled_sets({k: uri for k, uri in uris.items() if uri}, path="pretrain.probe")[1]


def _labelled_sets(
    uris: dict[str, str], *, path: str
) -> tuple[dict[str, LabelledSet], list[Problem]]:
    """The labelled sets that can be read, and the problems of all."""
    from components.runtime.image_sources.labelled import check_stray_files, read_labelled_set
    from dinov2_core.evaluation.labelled_set import LabelledPair  # with the decoder of images

    sets: dict[str, LabelledSet] = {}
    problems = []
    for half, uri in uris.items():
        try:
            sets[half] = read_labelled_set(uri)
            check_stray_files(sets[half])
        except UserError as error:
            problems.append(Problem(path=f"{path}.{half}", value=None, message=str(error)))
    if len(sets) == 2:
        try:
            LabelledPair(**sets)
        except LabelsMismatch as error:
            problems.append(Problem(path=path, value=None, message=str(error)))
    return sets, problems


def _file_problems(spec: PipelineSpec) -> list[Problem]:
    files: list[tuple[str, str]] = []
    embedding = spec.curate.embedding
    match embedding:
        case TimmEmbedding(weights=str(weights)):
            files.append(("curate.embedding.weights", weights))
        case TorchScriptEmbedding(path=path):
            files.append(("curate.embedding.path", path))
        case _:
            pass
    weights = spec.pretrain.initial_weights
    if is_weights_file(weights):
        files.append(("pretrain.initial_weights", str(weights_file(weights))))
    problems = [
        Problem(path=path, value=file, message="does not exist; name an existing file")
        for path, file in files
        if not Path(file).is_file()
    ]
    if isinstance(embedding, TimmEmbedding):
        problems += _timm_problems(embedding.name, path="curate.embedding.name")
    return [*problems, *_weights_problems(weights)]


def _weights_problems(source: str) -> list[Problem]:
    """Problems with starting weights elsewhere; a registry is asked when the stage starts."""
    path = "pretrain.initial_weights"
    if source.startswith("timm:"):
        return _timm_problems(source.removeprefix("timm:"), path=path)
    if not is_remote(source):
        return []
    from components.runtime.storage import find_object  # with the client of S3

    try:
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
