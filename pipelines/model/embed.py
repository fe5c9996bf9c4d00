"""Embeds images with a registered teacher into a Parquet file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from components.runtime.image_sources.opening import open_source
from components.runtime.progress import Reporter
from components.runtime.registry import Predict, load_embedder
from components.runtime.storage import StorageError
from components.runtime.tracking import TrackingUnreachable

CHUNK = 512
"""Images held in memory at a time."""

SCHEMA = pa.schema(
    [("uri", pa.string()), ("embedding", pa.list_(pa.float32())), ("error", pa.string())]
)


def embed_images(
    images: str, *, model_uri: str, output: Path, tracking_uri: str, batch_size: int
) -> tuple[int, int]:
    """Write one row per file: uri, embedding, and why there is none if it cannot be read.

    Returns:
        Rows written, and how many of them have no embedding.

    Raises:
        ValueError: No such images or model, or no tracking server.
    """
    try:
        source = open_source(images)
        items = source.objects()
        predict = load_embedder(model_uri, tracking_uri=chosen_tracking_uri(tracking_uri))
    except (StorageError, TrackingUnreachable) as error:
        raise ValueError(str(error)) from error
    if not items:
        raise ValueError(
            f"{images} holds no file; name a folder, a pattern or a prefix with images"
        )
    report = Reporter(None, stage="embed")
    failed = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    with parquet.ParquetWriter(partial, SCHEMA) as writer:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            contents = [source.read(item) for item in chunk]
            rows, errors = _embed_chunk(predict, contents, batch_size)
            failed += sum(error is not None for error in errors)
            uris = [item.uri for item in chunk]
            writer.write_table(
                pa.table({"uri": uris, "embedding": rows, "error": errors}, schema=SCHEMA)
            )
            report("embedding", min(start + CHUNK, len(items)), len(items))
    partial.replace(output)
    return len(items), failed


def _embed_chunk(
    predict: Predict, contents: list[bytes], batch_size: int
) -> tuple[list[NDArray[np.float32] | None], list[str | None]]:
    """Embeddings of a chunk; where one file is broken, the others still get theirs."""
    try:
        return list(predict(contents, batch_size)), [None] * len(contents)
    except ValueError:
        rows: list[NDArray[np.float32] | None] = []
        errors: list[str | None] = []
        for content in contents:
            try:
                rows.append(predict([content], 1)[0])
                errors.append(None)
            except ValueError as error:
                rows.append(None)
                errors.append(str(error))
        return rows, errors


def chosen_tracking_uri(given: str) -> str:
    """The store that was named, else the environment's, else the only one below runs/."""
    named = given or os.environ.get("MLFLOW_TRACKING_URI", "")
    if named:
        return named
    stores = sorted(Path("runs").glob("*/mlflow.db"))
    if len(stores) == 1:
        found = f"sqlite:///{stores[0].resolve()}"
        sys.stderr.write(f"tracking store: {found}\n")
        return found
    listed = ", ".join(f"sqlite:///{store}" for store in stores) or "http://server:5000"
    raise ValueError(f"which tracking store? set --tracking-uri, for example to one of: {listed}")
