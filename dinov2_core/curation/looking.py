"""One look at every file, block by block: what it is, and vector and thumbnail of its picture."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from dinov2_core.curation.embedding import Embedder
from dinov2_core.curation.registration import THUMBNAIL_SIDE, thumbnail
from dinov2_core.curation.scanning import ScannedImage, scan
from dinov2_core.curation.sources import ImageFiles, Progress, no_progress
from dinov2_core.data.decoding import MAX_PIXELS

BLOCK_FILES = 512
"""Files of a block: held decoded in memory, embedded together and kept together."""

LOOK_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("refusal", pa.string()),
        pa.field("pixel_sha256", pa.string(), nullable=False),
        pa.field("thumbnail", pa.binary(THUMBNAIL_SIDE**2)),
        pa.field("embedding", pa.list_(pa.float32())),
    ]
)
"""One row per file of a block. `refusal` is null for sound images. Thumbnail and embedding stand
with the first file of the block that shows a picture, and are null otherwise."""


def blocks(num_files: int) -> list[range]:
    """Files of every block by number; who looks at them has no say in it."""
    starts = range(0, num_files, BLOCK_FILES)
    return [range(start, min(start + BLOCK_FILES, num_files)) for start in starts]


def look(
    files: ImageFiles,
    numbers: range,
    *,
    embedder: Embedder,
    min_side_pixels: int = 8,
    max_pixels: int = MAX_PIXELS,
    num_threads: int = 2,
) -> pa.Table:
    """Look at the files of one block; the result depends on them alone.

    Args:
        files: The set that the block is of.
        numbers: Its files.
        embedder: Of its pictures.
        min_side_pixels: Images with a shorter side are refused.
        max_pixels: Images with more pixels are refused.
        num_threads: Files looked at at the same time.

    Returns:
        `LOOK_SCHEMA`.
    """
    scanned = list(
        scan(
            files,
            numbers,
            min_side_pixels=min_side_pixels,
            max_pixels=max_pixels,
            num_threads=num_threads,
        )
    )
    first: dict[str, int] = {}
    for row, one in enumerate(scanned):
        if one.image is not None:
            first.setdefault(one.pixel_sha256, row)
    images = [image for row in first.values() if (image := scanned[row].image) is not None]
    vectors = embedder.embed(images) if images else ()
    pictures = {
        row: {"thumbnail": thumbnail(image).tobytes(), "embedding": vector}
        for row, image, vector in zip(first.values(), images, vectors, strict=True)
    }
    rows = [_row(one) | pictures.get(row, {}) for row, one in enumerate(scanned)]
    return pa.Table.from_pylist(rows, schema=LOOK_SCHEMA)


def looks(
    files: ImageFiles,
    *,
    embedder: Embedder,
    min_side_pixels: int = 8,
    max_pixels: int = MAX_PIXELS,
    num_threads: int = 2,
    progress: Progress = no_progress,
) -> Iterator[pa.Table]:
    """Look at all files, one block after the other; see `look`.

    Args:
        files: The files.
        embedder: Of their pictures.
        min_side_pixels: Images with a shorter side are refused.
        max_pixels: Images with more pixels are refused.
        num_threads: Files looked at at the same time.
        progress: Told after every block.
    """
    for numbers in blocks(len(files)):
        yield look(
            files,
            numbers,
            embedder=embedder,
            min_side_pixels=min_side_pixels,
            max_pixels=max_pixels,
            num_threads=num_threads,
        )
        progress("scan", numbers.stop, len(files))


def _row(scanned: ScannedImage) -> dict[str, object]:
    return {
        "name": scanned.name,
        "sha256": scanned.sha256,
        "size_bytes": scanned.size_bytes,
        "width": scanned.width,
        "height": scanned.height,
        "format": scanned.format,
        "refusal": scanned.refusal,
        "pixel_sha256": scanned.pixel_sha256,
    }
