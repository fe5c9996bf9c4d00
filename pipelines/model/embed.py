"""Embeds images with a registered teacher into a table."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from components.runtime.image_sources.opening import open_source
from components.runtime.image_sources.source import ImageSource, StoredObject
from components.runtime.progress import Reporter
from components.runtime.registry import download_model, load_trusted, teacher_files
from components.runtime.retry import QUICK, retrying_with
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.errors import InputError, ObjectUnreadable, SettingsError, UnreadableImage
from dinov2_core.evaluation.embedder import TeacherEmbedder
from dinov2_core.weights.reading import read_state_dict
from pipelines.model.embedding_table import Row, check_ending, open_table

ROWS_AT_ONCE = 512
"""Rows of a Parquet row group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel:
    """A model in two steps, so that a file that cannot be read costs only itself."""

    decode: Callable[[bytes], Any]
    """An image file to what `embed` takes; raises UnreadableImage."""
    embed: Callable[[list[Any]], Sequence[NDArray[np.float32] | str]]
    """Decoded images to embeddings [D], or to the reason why there is none."""


def embed_images(
    images: str,
    *,
    model_uri: str,
    output: Path,
    tracking_uri: str,
    batch_size: int,
    trusts_code: bool = False,
) -> tuple[int, int]:
    """Write one row per file: uri, embedding, and why there is none if it cannot be read.

    Args:
        images: Folder, file, glob pattern, Parquet file or s3:// prefix.
        model_uri: Such as `models:/NAME@champion`.
        output: Table to write; see `open_table`.
        tracking_uri: Store or server that holds the model; empty as for `chosen_tracking_uri`.
        batch_size: Images per forward pass, and in memory.
        trusts_code: Whether a model that is no teacher of this program may run its own code.

    Returns:
        Rows written, and how many of them have no embedding.

    Raises:
        UserError: There are no such images or no such model, or the output has another ending.
        TransientError: A server or a store does not answer.
    """
    check_ending(output)
    with retrying_with(QUICK):
        source = open_source(images)
        items = source.objects()
    if not items:
        raise InputError(
            f"{images} holds no file; name a folder, a pattern or a prefix with images"
        )
    report = Reporter(None, stage="embed")
    failed = 0
    tracking_uri = chosen_tracking_uri(tracking_uri)
    with tempfile.TemporaryDirectory() as scratch:
        with retrying_with(QUICK):
            root = download_model(model_uri, tracking_uri=tracking_uri, directory=Path(scratch))
        model = embedding_model(root, model_uri=model_uri, trusts_code=trusts_code)
        with open_table(output) as write:
            rows: list[Row] = []
            for start in range(0, len(items), batch_size):
                rows += _embed_batch(model, source, items[start : start + batch_size])
                done = min(start + batch_size, len(items))
                if len(rows) >= ROWS_AT_ONCE or done == len(items):
                    failed += sum(row.embedding is None for row in rows)
                    write(rows)
                    rows = []
                report("embedding", done, len(items))
    return len(items), failed


def _embed_batch(
    model: EmbeddingModel, source: ImageSource, items: Sequence[StoredObject]
) -> list[Row]:
    results: list[NDArray[np.float32] | str] = []
    decoded: dict[int, Any] = {}
    for index, item in enumerate(items):
        reason = ""
        try:
            decoded[index] = model.decode(source.read(item))
        except (UnreadableImage, ObjectUnreadable) as error:
            reason = str(error)
        except MemoryError:
            reason = "does not fit into memory"
        results.append(reason)
    if decoded:
        embedded = model.embed(list(decoded.values()))
        for index, result in zip(decoded, embedded, strict=True):
            results[index] = result
    uris = [os.fsencode(item.uri).decode("utf-8", "backslashreplace") for item in items]
    return [
        Row(uri=uri, error=result) if isinstance(result, str) else Row(uri=uri, embedding=result)
        for uri, result in zip(uris, results, strict=True)
    ]


def embedding_model(root: Path, *, model_uri: str, trusts_code: bool) -> EmbeddingModel:
    """A downloaded model: a teacher by its weights alone, any other only if its code is trusted.

    Args:
        root: From `download_model`.
        model_uri: For messages.
        trusts_code: Whether code that the registry holds may run.

    Raises:
        InputError: The model's files are wrong.
        SettingsError: It is no teacher of this program, and its code is not trusted.
    """
    files = teacher_files(root, model_uri=model_uri)
    if files is None:
        if not trusts_code:
            raise SettingsError(
                f"model {model_uri} has no artifacts `weights` and `config`, so it is no teacher "
                "that dinopipe registered, and other models run code that the registry holds; name "
                "another model, or add --trust-code if you trust whoever registered it"
            )
        return EmbeddingModel(decode=lambda content: content, embed=_one_by_one(load_trusted(root)))
    teacher = TeacherConfig.of_registered(
        files.config.read_bytes(), source=f"the configuration of {model_uri}"
    )
    embedder = TeacherEmbedder(
        teacher.registered_form(),
        read_state_dict(files.weights).tensors,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    return EmbeddingModel(
        decode=embedder.decoded, embed=lambda pixels: list(embedder.embed_pixels(np.stack(pixels)))
    )


def _one_by_one(
    predict: Callable[[list[bytes]], NDArray[np.float32]],
) -> Callable[[list[bytes]], list[NDArray[np.float32] | str]]:
    """A foreign model's embeddings; after an error of a batch, of each file alone."""

    def embed(contents: list[bytes]) -> list[NDArray[np.float32] | str]:
        try:
            return list(predict(contents))
        except Exception as error:  # whatever the model raises for a file that it cannot read
            if len(contents) == 1:
                return [f"{type(error).__name__}: {error}"]
            return [result for content in contents for result in embed([content])]

    return embed


def chosen_tracking_uri(given: str) -> str:
    """The store that was named, else the environment's, else the only one below runs/.

    Raises:
        SettingsError: None is named and there is not exactly one.
    """
    named = given or os.environ.get("MLFLOW_TRACKING_URI", "")
    if named:
        return named
    stores = sorted(Path("runs").glob("*/mlflow.db"))
    if len(stores) == 1:
        found = f"sqlite:///{stores[0].resolve()}"
        sys.stderr.write(f"tracking store: {found}\n")
        return found
    listed = ", ".join(f"sqlite:///{store}" for store in stores) or "http://server:5000"
    raise SettingsError(
        f"which tracking store? set --tracking-uri, for example to one of: {listed}"
    )
