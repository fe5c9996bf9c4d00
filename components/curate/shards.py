"""Copies the kept images into shards."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa

from dinov2_core.curation.image_files import ImageFiles, Progress
from dinov2_core.curation.manifest import with_changed
from dinov2_core.data.shards import ShardWriter
from dinov2_core.errors import ObjectUnreadable


def write_shards(
    source: ImageFiles, manifest: pa.Table, directory: Path, *, size_bytes: int, progress: Progress
) -> pa.Table:
    """Copy the kept images into shards, in the order of the manifest.

    Args:
        source: All files of the manifest.
        manifest: `MANIFEST_SCHEMA`.
        directory: For the shards; emptied first.
        size_bytes: Size at which a shard is closed.
        progress: Called after every image.

    Returns:
        The manifest, in which files that are gone or not what was scanned are no longer kept.
    """
    shutil.rmtree(directory, ignore_errors=True)
    numbers = {source.name(number): number for number in range(len(source))}
    kept = manifest.filter(manifest["kept"])
    columns = ("uri", "sha256", "format", "width", "height")
    rows = zip(*(kept[name].to_pylist() for name in columns), strict=True)
    changed = []
    with ShardWriter(directory, target_size_bytes=size_bytes) as writer:
        for done, (uri, sha256, image_format, width, height) in enumerate(rows):
            content = _read_again(source, numbers[uri], sha256=sha256)
            if content is None:
                changed.append(uri)
            else:
                writer.add(content, extension=image_format, width=width, height=height)
            progress("writing shards", done + 1, len(kept))
    return with_changed(manifest, changed)


def _read_again(source: ImageFiles, number: int, *, sha256: str) -> bytes | None:
    """Content of a file; None if it is not what was scanned."""
    try:
        content = source.read(number)
    except (OSError, ObjectUnreadable):
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None
