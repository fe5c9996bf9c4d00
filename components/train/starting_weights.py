"""Downloads starting weights to this machine, whatever address names them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from components.runtime.manifests import digest_of_file
from components.runtime.registry import download_teacher
from components.runtime.storage import download_object, is_remote
from components.train.config import is_weights_file, weights_file
from dinov2_core.errors import InputError, TransientError

TIMM = "timm:"
BUSY = (408, 429)


def download_weights(source: str, *, directory: Path, tracking_uri: str) -> Path:
    """The file that holds starting weights, downloaded where it is not named by a path.

    Downloads stay in the directory, which all ranks must see; the same content is not kept twice.

    Args:
        source: A path (see `weights_file`), s3://BUCKET/KEY, timm:NAME.TAG, or
            models:/NAME@ALIAS.
        directory: Where downloads go.
        tracking_uri: Store or server that holds registered models.

    Raises:
        InputError: There is no such file, network of timm or registered teacher.
        AccessRefused: The service that has it refuses.
        TransientError: The service does not answer.
    """
    if is_remote(source):
        return download_object(source, directory=directory)
    if source.startswith(TIMM):
        return _from_timm(source, directory=directory)
    if not is_weights_file(source):
        return _from_registry(source, directory=directory, tracking_uri=tracking_uri)
    path = weights_file(source)
    if not path.is_file():
        raise InputError(
            f"weights {path} named by initial_weights do not exist; name an existing file, or a "
            "folder with a model.safetensors"
        )
    return path


def _from_timm(source: str, *, directory: Path) -> Path:
    name = source.removeprefix(TIMM)
    try:
        return Path(
            hf_hub_download(f"timm/{name}", "model.safetensors", local_dir=directory / name)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        kind = TransientError if _is_transient(error) else InputError
        raise kind(
            f"initial_weights {source} cannot be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}); check the name with its tag, and the network, or download "
            f"model.safetensors of timm/{name} elsewhere and name the file"
        ) from error


def _is_transient(error: HfHubHTTPError | LocalEntryNotFoundError) -> bool:
    """Whether the Hub does not answer, or says that it may later."""
    response = getattr(error, "response", None)
    if response is None:  # no connection
        return not constants.HF_HUB_OFFLINE
    return response.status_code >= 500 or response.status_code in BUSY


def _from_registry(source: str, *, directory: Path, tracking_uri: str) -> Path:
    """The weights of a registered teacher, named by their digest: an alias may move."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        files = download_teacher(source, tracking_uri=tracking_uri, directory=Path(scratch))
        path = directory / f"{digest_of_file(files.weights)[:32]}.safetensors"
        return files.weights.replace(path)
