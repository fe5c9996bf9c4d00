"""What was seen of pile and evaluation set: every file, and every distinct picture once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dinov2_core.curation.registration import THUMBNAIL_SIDE
from dinov2_core.curation.scanning import Refusal


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
    """Distinct pictures in the order they were first seen."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._embeddings: list[NDArray[np.float32]] = []
        self._thumbnails: list[NDArray[np.uint8]] = []

    def numbers_of(self, looks: pa.Table) -> list[int]:
        """Numbers of a block's pictures; new ones are remembered. -1 for refused files."""
        shown = looks.filter(pc.is_valid(looks["embedding"]))
        is_new = np.array([one not in self.numbers for one in _hashes(shown)], dtype=np.bool_)
        if is_new.any():
            new = shown.filter(pa.array(is_new))
            for pixel_sha256 in _hashes(new):
                self.numbers[pixel_sha256] = len(self.numbers)
            vectors = new["embedding"].combine_chunks().flatten().to_numpy()
            self._embeddings.append(vectors.reshape(new.num_rows, -1))
            pixels = np.frombuffer(b"".join(new["thumbnail"].to_pylist()), dtype=np.uint8)
            self._thumbnails.append(pixels.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return [self.numbers[one] if one else -1 for one in _hashes(looks)]

    def embeddings(self) -> NDArray[np.float32]:
        return np.concatenate(self._embeddings) if self._embeddings else np.zeros((0, 1), "f4")

    def thumbnails(self) -> NDArray[np.uint8]:
        none = np.zeros((0, THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
        return np.concatenate([none, *self._thumbnails])


def collect(pile: Iterable[pa.Table], *, evaluation: Iterable[pa.Table]) -> CollectedImages:
    """Bring together what was seen of both sets.

    Args:
        pile: Blocks of what was collected, each of `LOOK_SCHEMA`.
        evaluation: Blocks of images that must not be trained on; refused ones are ignored.

    Raises:
        ValueError: Two files of the pile have the same name.
    """
    pictures = _Pictures()
    records: list[FileRecord] = []
    numbers: list[int] = []
    for looks in pile:
        records += _records(looks)
        numbers += pictures.numbers_of(looks)
    shown = {number for looks in evaluation for number in pictures.numbers_of(looks)} - {-1}
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


def _hashes(looks: pa.Table) -> list[str]:
    hashes: list[str] = looks["pixel_sha256"].to_pylist()
    return hashes


def _records(looks: pa.Table) -> list[FileRecord]:
    columns = ["name", "sha256", "size_bytes", "width", "height", "format", "refusal"]
    return [
        FileRecord(**row | {"refusal": Refusal(row["refusal"]) if row["refusal"] else None})
        for row in looks.select(columns).to_pylist()
    ]
