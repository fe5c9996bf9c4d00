"""One look at every file: what it is, or why it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image

from dinov2_core.curation.sources import ImageFiles
from dinov2_core.data.decoding import MAX_PIXELS, image_format, open_image
from dinov2_core.errors import ObjectUnreadable, UnreadableImage


class Refusal(StrEnum):
    """Why a file cannot be a training image."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    READ_FAILED = "read_failed"
    """The storage, not the file, is at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedImage:
    """What one look at a file told."""

    name: str
    sha256: str
    """Of the bytes; empty if they could not be read."""
    size_bytes: int
    width: int
    """Pixels, 0 if refused before decoding."""
    height: int
    format: str
    """Encoding in lower case (`png`, `jpeg`), empty if refused before decoding."""
    pixel_sha256: str
    """Of size and pixels as colours, so that lossless re-encodings agree; empty if refused."""
    refusal: Refusal | None
    image: Image.Image | None
    """Decoded, mode `L` or `RGB`; None if refused."""


def scan(
    files: ImageFiles,
    numbers: Sequence[int],
    *,
    min_side_pixels: int,
    num_threads: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ScannedImage]:
    """Read, hash and decode some files once, in order; all of them are held in memory.

    Never stops at a bad file: it is yielded with its reason.

    Args:
        files: The files.
        numbers: Those that are looked at, a few hundred.
        min_side_pixels: Images with a shorter side are refused.
        num_threads: Files looked at at the same time.
        max_pixels: Images with more pixels are refused undecoded.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="scan") as pool:
        yield from pool.map(
            lambda number: scan_one(
                files, number, min_side_pixels=min_side_pixels, max_pixels=max_pixels
            ),
            numbers,
        )


def scan_one(
    files: ImageFiles, number: int, *, min_side_pixels: int, max_pixels: int
) -> ScannedImage:
    """Read, hash and decode one file; see `scan`."""
    name = files.name(number)
    try:
        content = files.read(number)
    except (OSError, ObjectUnreadable):
        return _refused(name, b"", Refusal.READ_FAILED, sha256="")
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        image = open_image(content, num_channels=3, max_pixels=max_pixels)
        encoding = image_format(content)
    except UnreadableImage as error:
        return _refused(name, content, Refusal(error.reason), sha256=sha256)
    width, height = image.size
    is_small = min(width, height) < min_side_pixels
    return ScannedImage(
        name=name,
        sha256=sha256,
        size_bytes=len(content),
        width=width,
        height=height,
        format=encoding,
        pixel_sha256="" if is_small else hash_pixels(image),
        refusal=Refusal.TOO_SMALL if is_small else None,
        image=None if is_small else image,
    )


def hash_pixels(image: Image.Image) -> str:
    """sha256 of size and 8-bit pixels; gray equals the same gray stored as colours."""
    pixels = np.asarray(image)
    if pixels.ndim == 3 and (pixels == pixels[:, :, :1]).all():
        pixels = pixels[:, :, 0]
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def _refused(name: str, content: bytes, refusal: Refusal, *, sha256: str) -> ScannedImage:
    return ScannedImage(
        name=name,
        sha256=sha256,
        size_bytes=len(content),
        width=0,
        height=0,
        format="",
        pixel_sha256="",
        refusal=refusal,
        image=None,
    )
