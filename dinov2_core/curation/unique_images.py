"""The scans of source images and evaluation images together: all files, every image once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dinov2_core.curation.alignment import THUMBNAIL_SIDE
from dinov2_core.curation.scanning import SCAN_SCHEMA
from dinov2_core.errors import InputError

_FILE_SCHEMA = pa.schema([SCAN_SCHEMA.field(number) for number in range(7)])


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueImages:
    """F source files, and the U unique images of them and of the evaluation images."""

    files: pa.Table
    """Columns `name` to `reason` of `SCAN_SCHEMA`, sorted by name [F]."""
    image_of_file: NDArray[np.int64]
    """Number of the unique image [F], -1 for files that are not used."""
    is_evaluation: NDArray[np.bool_]
    """Whether it is an evaluation image [U]."""
    pixel_hashes: NDArray[np.str_]
    """[U]."""
    embeddings: NDArray[np.float32]
    """[U, E]."""
    thumbnails: NDArray[np.uint8]
    """[U, 32, 32]."""


class _Collection:
    """Unique images in the order of their first files."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.embeddings = [np.zeros((0, 1), dtype=np.float32)]
        self.thumbnails = [np.zeros((0, THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)]

    def add(self, scan: pa.Table) -> list[int]:
        """Add the images of a block that are new; gives the numbers of all, -1 for unused files."""
        decoded = scan.filter(pc.is_valid(scan["embedding"]))
        is_new = [one not in self.numbers for one in decoded["pixel_sha256"].to_pylist()]
        new = decoded.filter(pa.array(is_new, pa.bool_()))
        if new.num_rows:
            for pixel_sha256 in new["pixel_sha256"].to_pylist():
                self.numbers[pixel_sha256] = len(self.numbers)
            vectors = new["embedding"].combine_chunks().flatten().to_numpy()
            self.embeddings.append(vectors.reshape(new.num_rows, -1))
            pixels = np.frombuffer(b"".join(new["thumbnail"].to_pylist()), dtype=np.uint8)
            self.thumbnails.append(pixels.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return [self.numbers[one] if one else -1 for one in scan["pixel_sha256"].to_pylist()]


def find_unique_images(
    source: Iterable[pa.Table], *, evaluation: Iterable[pa.Table]
) -> UniqueImages:
    """Merge the scans of both sets.

    Args:
        source: Blocks of the source images, each of `SCAN_SCHEMA`.
        evaluation: Blocks of images that must not be trained on; unused files are ignored.

    Raises:
        InputError: Two source files have the same name.
    """
    collection = _Collection()
    parts = [_FILE_SCHEMA.empty_table()]
    numbers: list[int] = []
    for scan in source:
        parts.append(scan.select(_FILE_SCHEMA.names))
        numbers += collection.add(scan)
    in_evaluation = {number for scan in evaluation for number in collection.add(scan)} - {-1}
    is_evaluation = np.zeros(len(collection.numbers), dtype=np.bool_)
    is_evaluation[sorted(in_evaluation)] = True
    files = pa.concat_tables(parts)
    order = pc.sort_indices(files["name"])
    files = files.take(order)
    names = files["name"]
    repeated = names.slice(1).filter(pc.equal(names.slice(1), names.slice(0, len(names) - 1)))
    if len(repeated):
        raise InputError(f"two images are named {repeated[0]}; give every file its own name")
    embeddings = collection.embeddings[1:] or collection.embeddings
    return UniqueImages(
        files=files,
        image_of_file=np.array(numbers, dtype=np.int64)[order.to_numpy()],
        is_evaluation=is_evaluation,
        pixel_hashes=np.array(list(collection.numbers), dtype=np.str_),
        embeddings=np.concatenate(embeddings),
        thumbnails=np.concatenate(collection.thumbnails),
    )
