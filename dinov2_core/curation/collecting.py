"""One pass over pile and evaluation set: what every file is, and every distinct picture once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation.embedding import Embedder
from dinov2_core.curation.registration import THUMBNAIL_SIDE, thumbnail
from dinov2_core.curation.scanning import Refusal, ScannedImage, scan
from dinov2_core.curation.sources import ImageFiles, Progress

_EMBED_IMAGES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What one look at a file of the pile told, without its pixels."""

    name: str
    sha256: str
    size_bytes: int
    width: int
    """Pixels, 0 if refused before decoding."""
    height: int
    format: str
    refusal: Refusal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedImages:
    """Files of the pile, sorted by name, and the U distinct pictures of pile and evaluation set."""

    pile: tuple[FileRecord, ...]
    pile_pictures: NDArray[np.int64]
    """Picture of every file [F], -1 for refused ones."""
    is_evaluation: NDArray[np.bool_]
    """Whether an evaluation image shows the picture [U]."""
    picture_hashes: tuple[str, ...]
    """Of the pixels [U]."""
    embeddings: NDArray[np.float32]
    """[U, E]."""
    thumbnails: NDArray[np.uint8]
    """[U, 32, 32]."""


class _Pictures:
    """Distinct pictures in the order they were first seen, embedded in batches."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._waiting: list[Image.Image] = []
        self._embeddings: list[NDArray[np.float32]] = []
        self._thumbnails: list[NDArray[np.uint8]] = []
        self.numbers: dict[str, int] = {}

    def number_of(self, scanned: ScannedImage) -> int:
        """Number of the picture; a new one is remembered. -1 for refused files."""
        if scanned.image is None:
            return -1
        known = self.numbers.get(scanned.pixel_sha256)
        if known is not None:
            return known
        self.numbers[scanned.pixel_sha256] = len(self.numbers)
        self._waiting.append(scanned.image)
        self._thumbnails.append(thumbnail(scanned.image))
        if len(self._waiting) == _EMBED_IMAGES:
            self._embed_waiting()
        return len(self.numbers) - 1

    def embeddings(self) -> NDArray[np.float32]:
        self._embed_waiting()
        return np.concatenate(self._embeddings) if self._embeddings else np.zeros((0, 1), "f4")

    def thumbnails(self) -> NDArray[np.uint8]:
        shape = (len(self._thumbnails), THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        return np.array(self._thumbnails, dtype=np.uint8).reshape(shape)

    def _embed_waiting(self) -> None:
        if self._waiting:
            self._embeddings.append(self._embedder.embed(self._waiting))
            self._waiting = []


def collect(
    pile: ImageFiles,
    *,
    evaluation: ImageFiles,
    embedder: Embedder,
    min_side_pixels: int,
    max_pixels: int,
    num_threads: int,
    progress: Progress,
) -> CollectedImages:
    """Scan both sets, embed every distinct picture once and keep its thumbnail.

    Args:
        pile: What was collected.
        evaluation: Images that must not be trained on; refused ones are ignored.
        embedder: Of the pictures.
        min_side_pixels: Images with a shorter side are refused.
        max_pixels: Images with more pixels are refused.
        num_threads: Files looked at at the same time.
        progress: Told about the scan.

    Raises:
        ValueError: Two files of the pile have the same name.
    """
    pictures = _Pictures(embedder)

    def look(files: ImageFiles) -> Iterable[ScannedImage]:
        return scan(
            files,
            min_side_pixels=min_side_pixels,
            max_pixels=max_pixels,
            num_threads=num_threads,
            progress=progress,
        )

    records: list[FileRecord] = []
    numbers: list[int] = []
    for scanned in look(pile):
        records.append(_record(scanned))
        numbers.append(pictures.number_of(scanned))
    shown = {pictures.number_of(scanned) for scanned in look(evaluation)} - {-1}
    is_evaluation = np.zeros(len(pictures.numbers), dtype=np.bool_)
    is_evaluation[sorted(shown)] = True
    order = sorted(range(len(records)), key=lambda number: records[number].name)
    for one, other in itertools.pairwise(order):
        if records[one].name == records[other].name:
            raise ValueError(
                f"two files of the pile are named {records[one].name}; give every file its own name"
            )
    return CollectedImages(
        pile=tuple(records[number] for number in order),
        pile_pictures=np.array(numbers, dtype=np.int64)[order],
        is_evaluation=is_evaluation,
        picture_hashes=tuple(pictures.numbers),
        embeddings=pictures.embeddings(),
        thumbnails=pictures.thumbnails(),
    )


def _record(scanned: ScannedImage) -> FileRecord:
    return FileRecord(
        name=scanned.name,
        sha256=scanned.sha256,
        size_bytes=scanned.size_bytes,
        width=scanned.width,
        height=scanned.height,
        format=scanned.format,
        refusal=scanned.refusal,
    )
