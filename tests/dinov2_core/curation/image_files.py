"""Image files in memory and in a folder, for tests of curation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from dinov2_core.curation.embedding import Embedder, PixelEmbedder
from dinov2_core.curation.image_files import ImageFiles, Progress, no_progress
from dinov2_core.curation.scanning import scan_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryImages:
    names: Sequence[str]
    contents: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        return self.names[number]

    def size_bytes(self, number: int) -> int:
        return len(self.contents[number])

    def read(self, number: int) -> bytes:
        return self.contents[number]


def folder_images(directory: Path) -> MemoryImages:
    paths = sorted(path for path in directory.iterdir())
    names = [path.name for path in paths]
    return MemoryImages(names=names, contents=[path.read_bytes() for path in paths])


def numbered(contents: Sequence[bytes]) -> MemoryImages:
    return MemoryImages(names=[f"{i:04d}" for i in range(len(contents))], contents=contents)


def scanned(
    files: ImageFiles, *, embedder: Embedder | None = None, progress: Progress = no_progress
) -> Iterator[pa.Table]:
    return scan_blocks(
        files,
        embedder=embedder or PixelEmbedder(),
        min_side_pixels=8,
        num_threads=2,
        progress=progress,
    )
