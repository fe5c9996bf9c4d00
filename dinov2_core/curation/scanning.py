"""One scan of every file: what it is, or why it is not used, and what its image is compared by."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation.alignment import THUMBNAIL_SIDE, thumbnail
from dinov2_core.curation.byte_budget import ByteBudget
from dinov2_core.curation.embedding import Embedder
from dinov2_core.curation.image_files import ImageFiles, Progress, no_progress
from dinov2_core.curation.jpeg import has_too_many_scans, is_damaged_jpeg
from dinov2_core.curation.manifest import Reason
from dinov2_core.data.decoding import (
    MAX_PIXELS,
    identify,
    open_image,
    strips,
)
from dinov2_core.errors import ObjectUnreadable, UnreadableImage

BLOCK_FILES = 512
"""Files that are scanned, embedded and saved together."""
BYTES_PER_PIXEL = 12
MAX_DECODED_BYTES = BYTES_PER_PIXEL * MAX_PIXELS
"""Memory in which all threads together decode: 1 GiB, for the largest image or seven of 12
megapixels, each shrunk as soon as it is decoded. What needs more is decoded alone: WebP and
JPEG 2000 take up to 2.2 GiB."""
MAX_ENCODED_BYTES = 2**29
"""Size of the files that all threads together hold; a larger one is held alone."""

_BYTES_PER_PIXEL_OF_FORMAT = {"WEBP": 17, "JPEG2000": 25}
_BLOCK_BYTES = 2**26

SCAN_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("pixel_sha256", pa.string(), nullable=False),
        pa.field("thumbnail", pa.binary(THUMBNAIL_SIDE**2)),
        pa.field("embedding", pa.list_(pa.float32())),
    ]
)
"""One row per file of a block. `reason` is empty for usable images. Thumbnail and embedding are in
the row of the first file of the block with these pixels, and null in the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScannedFile:
    name: str
    sha256: str = ""
    """Of the content; empty if it was not read."""
    size_bytes: int = 0
    width: int = 0
    """Pixels, 0 if it was not decoded."""
    height: int = 0
    format: str = ""
    """Encoding in lower case (`png`, `jpeg`)."""
    reason: str = ""
    """Why it is not used."""
    pixel_sha256: str = ""
    """Of size and pixels as colours, so that lossless re-encodings agree."""
    thumbnail: bytes | None = None
    embedder_input: NDArray[np.uint8] | None = None

    def row(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in SCAN_SCHEMA.names[:-2]}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scanner:
    """Scans single files in several threads, which together stay within the budgets."""

    files: ImageFiles
    embedder: Embedder
    min_side_pixels: int
    encoded_bytes: ByteBudget = field(default_factory=lambda: ByteBudget(MAX_ENCODED_BYTES))
    decoded_bytes: ByteBudget = field(default_factory=lambda: ByteBudget(MAX_DECODED_BYTES))

    def scan(self, number: int) -> _ScannedFile:
        name = self.files.name(number)
        with self.encoded_bytes.hold(self.files.size_bytes(number)):
            try:
                content = self.files.read(number)
            except (OSError, ObjectUnreadable):
                return _ScannedFile(name=name, reason=Reason.READ_FAILED)
            sha256 = hashlib.sha256(content).hexdigest()
            found = _ScannedFile(name=name, sha256=sha256, size_bytes=len(content))
            try:
                return self._decode(found, content)
            except UnreadableImage as error:
                return replace(found, reason=Reason(error.reason))

    def _decode(self, found: _ScannedFile, content: bytes) -> _ScannedFile:
        header = identify(content)
        num_pixels = header.width * header.height
        if has_too_many_scans(content, num_pixels=num_pixels):
            return replace(found, reason=Reason.TOO_MANY_SCANS)
        needed = _BYTES_PER_PIXEL_OF_FORMAT.get(header.format or "", BYTES_PER_PIXEL)
        with self.decoded_bytes.hold(num_pixels * needed):
            image = open_image(content, num_channels=3)
            encoding = (header.format or "unknown").lower()
            found = replace(found, width=image.width, height=image.height, format=encoding)
            if min(image.size) < self.min_side_pixels:
                return replace(found, reason=Reason.TOO_SMALL)
            if is_damaged_jpeg(content):
                return replace(found, reason=Reason.DAMAGED)
            return replace(
                found,
                pixel_sha256=hash_pixels(image),
                thumbnail=thumbnail(image).tobytes(),
                embedder_input=self.embedder.prepare(image),
            )


def blocks(num_files: int) -> list[range]:
    """Numbers of the files of every block; they depend on nothing else."""
    starts = range(0, num_files, BLOCK_FILES)
    return [range(start, min(start + BLOCK_FILES, num_files)) for start in starts]


def scan_block(
    files: ImageFiles,
    numbers: range,
    *,
    embedder: Embedder,
    min_side_pixels: int,
    num_threads: int,
) -> pa.Table:
    """Read, hash, decode and embed the files of one block; the result depends on them alone.

    Args:
        files: The set that the block is part of.
        numbers: Files of the block.
        embedder: Embeds each distinct image once.
        min_side_pixels: Images with a shorter side are not used.
        num_threads: Files that are scanned at the same time.

    Returns:
        `SCAN_SCHEMA`.
    """
    # Blocks of images that malloc maps by themselves are given back as soon as they are freed.
    Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined]
    scanner = _Scanner(files=files, embedder=embedder, min_side_pixels=min_side_pixels)
    rows: list[dict[str, object]] = []
    unique: set[str] = set()
    waiting: dict[int, NDArray[np.uint8]] = {}

    def embed() -> None:
        vectors = embedder.embed(list(waiting.values())) if waiting else ()
        for row, vector in zip(waiting, vectors, strict=True):
            rows[row]["embedding"] = vector
        waiting.clear()

    for found in _in_order(scanner.scan, numbers, num_threads=num_threads):
        rows.append(found.row())
        if found.embedder_input is None or found.pixel_sha256 in unique:
            continue
        unique.add(found.pixel_sha256)
        rows[-1]["thumbnail"] = found.thumbnail
        waiting[len(rows) - 1] = found.embedder_input
        if len(waiting) == embedder.batch_size:
            embed()
    embed()
    return pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)


def scan_blocks(
    files: ImageFiles,
    *,
    embedder: Embedder,
    min_side_pixels: int,
    num_threads: int,
    progress: Progress = no_progress,
) -> Iterator[pa.Table]:
    """Scan all files, one block after the other; see `scan_block`."""
    for numbers in blocks(len(files)):
        yield scan_block(
            files,
            numbers,
            embedder=embedder,
            min_side_pixels=min_side_pixels,
            num_threads=num_threads,
        )
        progress("scan", numbers.stop, len(files))


def hash_pixels(image: Image.Image) -> str:
    """sha256 of size and 8-bit pixels; gray equals the same gray stored as colours."""
    is_gray = image.mode == "L" or not any(_has_colour(strip) for _, strip in strips(image))
    shape = (image.height, image.width) if is_gray else (image.height, image.width, 3)
    digest = hashlib.sha256(repr(shape).encode())
    for _, strip in strips(image):
        digest.update((strip.getchannel(0) if is_gray else strip).tobytes())
    return digest.hexdigest()


def _has_colour(strip: Image.Image) -> bool:
    pixels = np.asarray(strip)
    return bool((pixels != pixels[:, :, :1]).any())


def _in_order(
    scan: Callable[[int], _ScannedFile], numbers: Sequence[int], *, num_threads: int
) -> Iterator[_ScannedFile]:
    """Results in the order of the numbers, at most two per thread ahead of what was taken."""
    pending: deque[Future[_ScannedFile]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="scan") as pool:
        for number in numbers:
            pending.append(pool.submit(scan, number))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
