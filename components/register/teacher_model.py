"""The registered teacher: images in, cls embeddings out.

MLflow runs this file wherever the model is loaded. What it imports of the core is copied into the
model version under another name (see `bundle`), so that it needs torch, safetensors, numpy, pandas,
Pillow and MLflow alone. Beside it lie two artifacts: `weights`, a safetensors file with the names
of the reference implementation, and `config`, a JSON object with the sections `architecture` and
`preprocessing`.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from dinov2_core.data.decoding import MAX_PIXELS
from dinov2_core.errors import UnreadableImage
from dinov2_core.evaluation.embedder import OUTPUTS, Output, TeacherEmbedder
from dinov2_core.evaluation.preprocessing import resize_and_crop

logger = logging.getLogger(__name__)

IMAGE_COLUMN = "image"
Items = Sequence[object] | NDArray[Any]
ALLOWS_PATHS = "DINOPIPE_MODEL_ALLOWS_PATHS"
SERVING_VARIABLES = ("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "__pyfunc_model_path__")
"""Set by MLflow's scoring server in its own process."""
SERVERS = ("uvicorn", "gunicorn", "hypercorn", "waitress", "mlserver")
"""Modules one of which is loaded in a process that answers HTTP; MLflow alone loads none."""


class InvalidRequest(MlflowException, ValueError):
    """Something is wrong with what was given to `predict`; a client gets the message alone."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one call of `predict` may hold; a served model has bounds, set by its environment."""

    opens_paths: bool
    """Whether text may name a file; a `Path` always does, which no client can send."""
    num_images: int = sys.maxsize
    """Images."""
    num_bytes: int = sys.maxsize
    """Bytes of all image files together."""
    num_pixels: int = MAX_PIXELS
    """Width times height of one image."""

    @classmethod
    def here(cls) -> Limits:
        """The limits of this process."""
        allowed = os.environ.get(ALLOWS_PATHS, "")
        if not is_serving():
            return cls(opens_paths=allowed != "0")
        return cls(
            opens_paths=allowed == "1",
            num_images=int(os.environ.get("DINOPIPE_MODEL_MAX_IMAGES", "64")),
            num_bytes=int(os.environ.get("DINOPIPE_MODEL_MAX_BYTES", str(256 << 20))),
            num_pixels=int(os.environ.get("DINOPIPE_MODEL_MAX_PIXELS", "50000000")),
        )


def is_serving() -> bool:
    """Whether this process answers HTTP, so that a client chooses what `predict` gets."""
    return any(name in os.environ for name in SERVING_VARIABLES) or any(
        name in sys.modules for name in SERVERS
    )


class TeacherModel(PythonModel):
    """Embeds images with the teacher's backbone, on the GPU where there is one.

    Accepted by `predict`: a DataFrame with the column `image` (or with a single column of any
    name), a Series, a list, or one item; an item is the bytes of an image file, those bytes as
    base64 text, or a path. Arrays: uint8 [B, H, W, C] is preprocessed like a file, float
    [B, C, H, W] must be normalised already.

    Text is a path where such a file exists, base64 otherwise. In a process that answers HTTP (see
    `is_serving`) it is base64 only, unless DINOPIPE_MODEL_ALLOWS_PATHS is 1 there, one request is
    computed at a time, and DINOPIPE_MODEL_MAX_IMAGES (64), DINOPIPE_MODEL_MAX_BYTES (256 MiB, all
    files of a request) and DINOPIPE_MODEL_MAX_PIXELS (50 million, each image) bound it.

    Params: `batch_size`, images per forward pass (64), and `output`: "cls" gives [B, D],
    "cls+patch_mean" [B, 2 D].
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read configuration and weights, and check the one against the other."""
        described = json.loads(Path(context.artifacts["config"]).read_bytes())
        self.embedder = TeacherEmbedder(
            described,
            load_file(context.artifacts["weights"]),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        self._lock = threading.Lock()
        size = self.embedder.preprocessing.size_pixels
        self.embedder.embed(torch.zeros(1, self.embedder.num_channels, size, size))

    def predict(  # the annotation names the form that is served; the others pass as they are
        self,
        context: PythonModelContext | None,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return embeddings, float32 [B, D] or [B, 2 D]; see the class for what goes in.

        Raises:
            InvalidRequest: An item cannot be read as an image, a parameter is unknown, or a limit
                is exceeded.
        """
        serving = is_serving()
        with self._lock if serving else nullcontext(), _without_traceback(serving):
            return self._predict(model_input, params or {}, limits=Limits.here())

    def _predict(
        self, model_input: object, params: Mapping[str, Any], *, limits: Limits
    ) -> NDArray[np.float32]:
        batch_size, output = _parameters(params)
        items = _items(model_input)
        if len(items) > limits.num_images:
            raise InvalidRequest(
                f"{len(items)} images are more than the {limits.num_images} of one request; send "
                "them in several"
            )
        width = self.embedder.embed_dim * (1 if output == "cls" else 2)
        embedded = [np.zeros((0, width), np.float32)]
        if isinstance(items, np.ndarray) and items.dtype.kind == "f":
            images = torch.from_numpy(np.ascontiguousarray(items, dtype=np.float32))
            self._check_normalised(images, limits)
            embedded += [
                self.embedder.embed(part, output=output) for part in torch.split(images, batch_size)
            ]
        else:
            reader = _Reader(self.embedder, limits)
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                pixels = [reader.pixels(item, start + index) for index, item in enumerate(batch)]
                embedded.append(self.embedder.embed_pixels(np.stack(pixels), output=output))
        return np.concatenate(embedded)

    def _check_normalised(self, images: torch.Tensor, limits: Limits) -> None:
        channels, patch = self.embedder.num_channels, self.embedder.patch_size_pixels
        height, width = images.shape[2:]
        if images.shape[1] != channels or height % patch or width % patch or not height * width:
            raise InvalidRequest(
                f"float array has shape {list(images.shape)}; give normalised images [B, C, H, W] "
                f"with C = {channels} and H and W multiples of {patch}, or uint8 [B, H, W, C]"
            )
        most = limits.num_images * self.embedder.preprocessing.size_pixels**2
        if len(images) * height * width > most:
            raise InvalidRequest(
                f"float array has shape {list(images.shape)}, more than the {most} pixels of one "
                "request; send fewer or smaller images"
            )


class _Reader:
    """Reads the items of one request, one after the other."""

    def __init__(self, embedder: TeacherEmbedder, limits: Limits) -> None:
        self._embedder = embedder
        self._limits = limits
        self._num_bytes = 0

    def pixels(self, item: object, index: int) -> NDArray[np.uint8]:
        """Square [S, S, C] of one item; an error names its position."""
        try:
            if isinstance(item, np.ndarray):
                return self._of_array(item)
            return self._embedder.decoded(self._content(item), max_pixels=self._limits.num_pixels)
        except (UnreadableImage, OSError, InvalidRequest) as error:
            what = f"{item!r:.80}" if isinstance(item, str | Path) else type(item).__name__
            what = f"{len(item)} bytes" if isinstance(item, bytes) else what
            raise InvalidRequest(
                f"item {index} (counted from 0; {what}) cannot be read as an image: {error}; "
                "give the bytes of a whole image file, or those bytes as base64"
            ) from error

    def _content(self, item: object) -> bytes:
        if isinstance(item, bytes | bytearray | memoryview):
            self._count(len(item))
            return bytes(item)
        if isinstance(item, Path) or (isinstance(item, str) and self._is_file(item)):
            self._count(Path(item).stat().st_size)
            return Path(item).read_bytes()
        if not isinstance(item, str):
            raise InvalidRequest(f"type {type(item).__name__} is none of the known forms")
        self._count(len(item) * 3 // 4)
        try:
            return base64.b64decode("".join(item.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            if self._limits.opens_paths:
                raise InvalidRequest("neither a file that exists here nor base64 text") from error
            raise InvalidRequest(
                f"not base64 text, and a server opens no paths unless {ALLOWS_PATHS} is 1"
            ) from error

    def _is_file(self, text: str) -> bool:
        try:
            return self._limits.opens_paths and Path(text).is_file()
        except (OSError, ValueError):  # base64 text may be too long for a file name
            return False

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.num_bytes:
            raise InvalidRequest(
                f"the files hold more than the {self._limits.num_bytes} bytes of one request"
            )

    def _of_array(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        channels = self._embedder.num_channels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise InvalidRequest(
                f"pixels of type {pixels.dtype} and shape {list(pixels.shape)} are not uint8 "
                f"[H, W, {channels}]"
            )
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        return resize_and_crop(image, preprocessing=self._embedder.preprocessing)


@contextmanager
def _without_traceback(serving: bool) -> Iterator[None]:
    """In a server, errors that are nobody's fault but ours: the log gets them, not the client."""
    try:
        yield
    except Exception as error:
        if not serving or isinstance(error, MlflowException):
            raise
        logger.exception("a request failed")
        raise MlflowException(
            "the model failed on this request; the server's log has the reason",
            error_code=INTERNAL_ERROR,
        ) from None


def _parameters(params: Mapping[str, Any]) -> tuple[int, Output]:
    batch_size, output = params.get("batch_size", 64), params.get("output", "cls")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidRequest(f"params batch_size {batch_size!r} is no integer of at least 1")
    if output not in OUTPUTS:
        raise InvalidRequest(f"params output {output!r} is unknown; choose one of {list(OUTPUTS)}")
    return batch_size, output


def _items(model_input: object) -> Items:
    """Return a list of items, or a numeric array [B, ...] that stands for images."""
    if isinstance(model_input, Mapping):
        model_input = pd.DataFrame({name: pd.Series(list(v)) for name, v in model_input.items()})
    if isinstance(model_input, pd.DataFrame):
        columns = list(model_input.columns)
        if IMAGE_COLUMN not in columns and len(columns) != 1:
            raise InvalidRequest(
                f"the data frame has the columns {columns}; put the images into one column named "
                f"{IMAGE_COLUMN!r}"
            )
        model_input = model_input[IMAGE_COLUMN if IMAGE_COLUMN in columns else columns[0]]
    if isinstance(model_input, pd.Series | list | tuple):
        return list(model_input)
    if isinstance(model_input, str | bytes | Path):
        return [model_input]
    if isinstance(model_input, np.ndarray):
        if model_input.ndim == 4 and (
            model_input.dtype == np.uint8 or model_input.dtype.kind == "f"
        ):
            return model_input
        if model_input.dtype.kind in "OUS" and model_input.ndim in (1, 2):
            return list(model_input.ravel().tolist())
        raise InvalidRequest(
            f"array of type {model_input.dtype} and shape {list(model_input.shape)} is not "
            "accepted; give uint8 [B, H, W, C], normalised float [B, C, H, W], or bytes"
        )
    raise InvalidRequest(
        f"input of type {type(model_input).__name__} is not accepted; give a data frame with the "
        f"column {IMAGE_COLUMN!r}, a list of bytes, base64 strings or paths, or an array"
    )


mlflow.models.set_model(TeacherModel())
