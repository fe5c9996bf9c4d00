"""Image shards: plain tar files of original bytes and an index for reading them at random."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

INDEX_NAME = "index.parquet"
"""File beside the shards, written last: a directory without it is not complete."""

_BLOCK_BYTES = 512
_INDEX_SCHEMA = pa.schema(
    [
        ("sha256", pa.string()),
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
            raise ValueError(
                f"{directory} already holds shards ({INDEX_NAME} exists); write to an empty one"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._target_size_bytes = target_size_bytes
        self._entries: list[ShardEntry] = []
        self._known: set[str] = set()
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
            ValueError: The same bytes were added before.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in self._known:
            raise ValueError(
                f"image {sha256} is already in {self._directory}; remove exact copies before "
                "writing shards"
            )
        tar = self._open_shard()
        member = tarfile.TarInfo(f"{sha256}.{extension}")
        member.size = len(content)
        member.mode = 0o644
        offset = tar.offset + _BLOCK_BYTES
        tar.addfile(member, BytesIO(content))
        self._known.add(sha256)
        self._entries.append(
            ShardEntry(
                sha256=sha256,
                shard=f"shard-{self._num_shards - 1:05d}.tar",
                offset=offset,
                size_bytes=len(content),
                width=width,
                height=height,
            )
        )
        if tar.offset >= self._target_size_bytes:
            self._close_shard()
        return sha256

    def close(self) -> None:
        """Finish the last shard and write the index; the directory is complete afterwards."""
        self._close_shard()
        columns = {
            name: [getattr(entry, name) for entry in self._entries] for name in _INDEX_SCHEMA.names
        }
        partial = self._directory / f"{INDEX_NAME}.partial"
        pq.write_table(pa.table(columns, schema=_INDEX_SCHEMA), partial, compression="zstd")
        partial.rename(self._directory / INDEX_NAME)

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
    """Images of a directory of shards by number, safe to share between threads."""

    def __init__(self, directory: Path) -> None:
        """Read the index; shards are opened when first needed.

        Args:
            directory: Holds the shards and their index.

        Raises:
            ValueError: The index is absent, so the directory was not written to its end.
        """
        index_path = directory / INDEX_NAME
        if not index_path.exists():
            raise ValueError(
                f"{directory} holds no {INDEX_NAME}; write its shards to the end, or point to a "
                "directory that a ShardWriter has closed"
            )
        table = pq.read_table(index_path, schema=_INDEX_SCHEMA)
        shards = table["shard"].combine_chunks().dictionary_encode()
        self._directory = directory
        self._sha256 = table["sha256"].combine_chunks()
        self._shard_names: list[str] = shards.dictionary.to_pylist()
        self._shard_numbers = shards.indices.to_numpy(zero_copy_only=False)
        self._offsets = table["offset"].to_numpy()
        self._sizes = table["size_bytes"].to_numpy()
        self._widths = table["width"].to_numpy()
        self._heights = table["height"].to_numpy()
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._offsets)

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
            ValueError: The shard ends before the image does.
        """
        shard_number = int(self._shard_numbers[number])
        size = int(self._sizes[number])
        content = os.pread(self._descriptor(shard_number), size, int(self._offsets[number]))
        if len(content) != size:
            entry = self.entry(number)
            raise ValueError(
                f"{self._directory / entry.shard} ends within image {entry.sha256} (offset "
                f"{entry.offset}, {len(content)} of {size} bytes); copy the shard again"
            )
        return content

    def entry(self, number: int) -> ShardEntry:
        """Index line of one image."""
        return ShardEntry(
            sha256=self._sha256[number].as_py(),
            shard=self._shard_names[int(self._shard_numbers[number])],
            offset=int(self._offsets[number]),
            size_bytes=int(self._sizes[number]),
            width=int(self._widths[number]),
            height=int(self._heights[number]),
        )

    def close(self) -> None:
        """Release the shard files; reading again opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, shard_number: int) -> int:
        with self._lock:
            if shard_number not in self._descriptors:
                path = self._directory / self._shard_names[shard_number]
                self._descriptors[shard_number] = os.open(path, os.O_RDONLY)
            return self._descriptors[shard_number]
