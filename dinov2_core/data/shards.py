"""Image shards: plain tar files of original bytes and an index for reading them at random."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinov2_core.errors import InputError

INDEX_NAME = "index.parquet"
"""File beside the shards, written last: a directory without it is not complete."""

_BLOCK_BYTES = 512
_ROWS_PER_GROUP = 1 << 16
"""Rows that are written at a time and read at a time to learn a digest."""
_MAX_OPEN_SHARDS = 128
"""Far below the 1,024 open files that many systems allow a process."""
_INDEX_SCHEMA = pa.schema(
    [
        ("sha256", pa.binary(32)),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """Where one image lies and what it is."""

    sha256: str
    """Of the original bytes, hexadecimal."""
    shard: str
    """File name of the shard."""
    offset: int
    """First byte of the image in the shard."""
    size_bytes: int
    width: int
    """Pixels."""
    height: int
    """Pixels."""


class ShardWriter:
    """Writes images to `shard-00000.tar`, `shard-00001.tar`, ... and the index on closing.

    The same images in the same order give the same files byte for byte. Left by an exception, no
    index is written, so a reader refuses the directory.
    """

    def __init__(self, directory: Path, *, target_size_bytes: int) -> None:
        """Prepare a directory.

        Args:
            directory: Where the shards go; made if absent, must hold no index.
            target_size_bytes: A shard is closed once it holds at least this many bytes.
        """
        if target_size_bytes < 1:
            raise ValueError(
                f"target_size_bytes {target_size_bytes} is no size; choose e.g. 268435456"
            )
        if (directory / INDEX_NAME).exists():
            raise InputError(
                f"{directory} already holds shards ({INDEX_NAME} exists); write to an empty one"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._target_size_bytes = target_size_bytes
        self._index = pq.ParquetWriter(
            self._partial_index,
            _INDEX_SCHEMA,
            compression={"sha256": "NONE"} | dict.fromkeys(_INDEX_SCHEMA.names[1:], "ZSTD"),
            use_dictionary=["shard"],
        )
        self._rows: list[tuple[bytes, str, int, int, int, int]] = []
        self._known: set[bytes] = set()
        self._num_shards = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_shard()
            self._index.close()
            self._partial_index.unlink()

    def add(self, content: bytes, *, extension: str, width: int, height: int) -> str:
        """Append one image.

        Args:
            content: Original bytes, stored untouched.
            extension: File ending without a dot, e.g. `jpeg`.
            width: Pixels.
            height: Pixels.

        Returns:
            The sha256 of the content, which names the member.

        Raises:
            InputError: The same bytes were added before.
        """
        digest = hashlib.sha256(content).digest()
        if digest in self._known:
            raise InputError(
                f"image {digest.hex()} is already in {self._directory}; remove exact copies "
                "before writing shards"
            )
        tar = self._open_shard()
        member = tarfile.TarInfo(f"{digest.hex()}.{extension}")
        member.size = len(content)
        member.mode = 0o644
        offset = tar.offset + _BLOCK_BYTES
        tar.addfile(member, BytesIO(content))
        self._known.add(digest)
        shard = f"shard-{self._num_shards - 1:05d}.tar"
        self._rows.append((digest, shard, offset, len(content), width, height))
        if len(self._rows) == _ROWS_PER_GROUP:
            self._write_rows()
        if tar.offset >= self._target_size_bytes:
            self._close_shard()
        return digest.hex()

    def close(self) -> None:
        """Finish the last shard and the index; the directory is complete afterwards."""
        self._close_shard()
        self._write_rows()
        self._index.close()
        self._partial_index.rename(self._directory / INDEX_NAME)

    @property
    def _partial_index(self) -> Path:
        return self._directory / f"{INDEX_NAME}.partial"

    def _write_rows(self) -> None:
        if self._rows:
            columns = [list(column) for column in zip(*self._rows, strict=True)]
            self._index.write_table(pa.table(columns, schema=_INDEX_SCHEMA))
            self._rows.clear()

    def _open_shard(self) -> tarfile.TarFile:
        if self._tar is None:
            path = self._directory / f"shard-{self._num_shards:05d}.tar"
            self._tar = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)
            self._num_shards += 1
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None


class ShardReader:
    """Images of a directory of shards by number, safe to share between threads.

    An image takes 8 bytes of memory: where it begins, in blocks of its tar file, and its length.
    Digest, width and height are read from the index when they are asked for.
    """

    def __init__(self, directory: Path) -> None:
        """Read the index; shards are opened when first needed.

        Args:
            directory: Holds the shards and their index.

        Raises:
            InputError: The index is absent, so the directory was not written to its end.
        """
        self._directory = directory
        index_path = directory / INDEX_NAME
        if not index_path.exists():
            raise InputError(
                f"{directory} holds no {INDEX_NAME}; write its shards to the end, or point to a "
                "directory that a ShardWriter has closed"
            )
        with pq.ParquetFile(index_path, read_dictionary=["shard"], pre_buffer=False) as index:
            groups = [index.metadata.row_group(i) for i in range(index.num_row_groups)]
            self._group_ends = list(accumulate(group.num_rows for group in groups))
            self._blocks: NDArray[np.uint32] = np.empty(index.metadata.num_rows, np.uint32)
            self._sizes: NDArray[np.uint32] = np.empty(index.metadata.num_rows, np.uint32)
            self._run_starts: list[int] = []  # images at which another shard begins
            self._run_names: list[str] = []
            first = 0
            for batch in index.iter_batches(columns=["shard", "offset", "size_bytes"]):
                self._take(batch, first=first)
                first += len(batch)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def _take(self, batch: pa.RecordBatch, *, first: int) -> None:
        """Keep what finds the images of one batch of the index."""
        rows = slice(first, first + len(batch))
        offsets = batch["offset"].to_numpy()
        sizes = batch["size_bytes"].to_numpy()
        assert not (offsets % _BLOCK_BYTES).any(), (self._directory, offsets)
        assert max(offsets.max() // _BLOCK_BYTES, sizes.max()) < 1 << 32, (offsets, sizes)
        self._blocks[rows] = offsets // _BLOCK_BYTES
        self._sizes[rows] = sizes
        shards = batch["shard"]
        names = shards.dictionary.to_pylist()
        numbers = shards.indices.to_numpy()
        for start in (0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()):
            name = names[numbers[start]]
            if not self._run_names or self._run_names[-1] != name:
                self._run_starts.append(first + start)
                self._run_names.append(name)

    def __len__(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, number: int) -> bytes:
        """Original bytes of one image.

        Raises:
            InputError: The shard ends before the image does.
        """
        shard, offset, size = self._place(number)
        with self._opened(shard) as descriptor:
            content = os.pread(descriptor, size, offset)
        if len(content) != size:
            raise InputError(
                f"{self._directory / shard} ends within image {self.entry(number).sha256} (offset "
                f"{offset}, {len(content)} of {size} bytes); copy the shard again"
            )
        return content

    def entry(self, number: int) -> ShardEntry:
        """Index line of one image, read from the disk."""
        return self.entries([number])[0]

    def entries(self, numbers: Sequence[int]) -> list[ShardEntry]:
        """Index lines of some images, read from the disk; each part of the index is read once."""
        by_group: dict[int, list[int]] = {}
        for number in sorted(set(numbers)):
            by_group.setdefault(bisect_right(self._group_ends, number), []).append(number)
        found: dict[int, ShardEntry] = {}
        with pq.ParquetFile(self._directory / INDEX_NAME) as index:
            for group, wanted in by_group.items():
                table = index.read_row_group(group, columns=["sha256", "width", "height"])
                first = self._group_ends[group] - table.num_rows
                rows = table.take([number - first for number in wanted]).to_pylist()
                for number, row in zip(wanted, rows, strict=True):
                    found[number] = self._entry(number, **row)
        return [found[number] for number in numbers]

    def _entry(self, number: int, *, sha256: bytes | str, width: int, height: int) -> ShardEntry:
        shard, offset, size = self._place(number)
        return ShardEntry(
            sha256=sha256 if isinstance(sha256, str) else sha256.hex(),  # text in older indexes
            shard=shard,
            offset=offset,
            size_bytes=size,
            width=width,
            height=height,
        )

    def _place(self, number: int) -> tuple[str, int, int]:
        """Shard, offset and size of one image."""
        shard = self._run_names[bisect_right(self._run_starts, number) - 1]
        return shard, int(self._blocks[number]) * _BLOCK_BYTES, int(self._sizes[number])

    def close(self) -> None:
        """Release the shard files; reading again opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    @contextmanager
    def _opened(self, shard: str) -> Iterator[int]:
        """Descriptor of a shard; the first shards stay open, others are opened for each read."""
        with self._lock:
            descriptor = self._descriptors.get(shard)
            stays_open = descriptor is not None or len(self._descriptors) < _MAX_OPEN_SHARDS
            if descriptor is None:
                descriptor = os.open(self._directory / shard, os.O_RDONLY)
                if stays_open:
                    self._descriptors[shard] = descriptor
        try:
            yield descriptor
        finally:
            if not stays_open:
                os.close(descriptor)
