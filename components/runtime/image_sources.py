"""Piles of images: listing and reading the objects of a folder, a table or an s3:// prefix."""

from __future__ import annotations

import glob as globbing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from components.runtime import s3
from components.runtime.uris import bucket_and_key, is_remote
from dinov2_core.errors import InputError

PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object under a root."""

    key: str
    """Path relative to the root, with forward slashes."""
    uri: str
    """Where it is read from."""
    size_bytes: int
    """Size of the object."""
    etag: str = ""
    """What the store says of the content; empty for files."""


class ObjectSource(Protocol):
    """A root under which objects lie."""

    def objects(self) -> list[StoredObject]:
        """All objects, ordered by key."""
        ...

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one object."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """Files below a folder, or those that a glob pattern matches."""

    pattern: str

    def objects(self) -> list[StoredObject]:
        """All files, ordered by path; hidden files and folders are left out.

        Raises:
            InputError: Nothing exists at the path, or nothing matches the pattern.
        """
        root, paths = self._root_and_paths()
        items = [
            StoredObject(
                key=path.relative_to(root).as_posix(), uri=str(path), size_bytes=_size(path)
            )
            for path in paths
        ]
        return sorted(items, key=lambda item: item.key)

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one file."""
        return Path(item.uri).read_bytes()

    def _root_and_paths(self) -> tuple[Path, Iterator[Path]]:
        root = Path(self.pattern)
        if root.is_dir():
            return root, _files_below(root)
        if root.is_file():
            return root.parent, iter([root])
        if not globbing.has_magic(self.pattern):
            raise InputError(
                f"folder {self.pattern} does not exist; name an existing folder or file, a glob "
                f"pattern, a Parquet file or an s3:// prefix"
            )
        matches = [Path(path) for path in globbing.glob(self.pattern, recursive=True)]
        return _fixed_folder(self.pattern), (path for path in matches if path.is_file())


def _files_below(root: Path) -> Iterator[Path]:
    """Files of a folder and of the folders that it holds or links to, each folder once."""

    def refuse(error: OSError) -> None:
        raise InputError(
            f"folder {error.filename} cannot be read ({error.strerror}); check its permissions"
        ) from error

    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _size(path: Path) -> int:
    """Bytes of a file; 0 for one that cannot be looked at, which reading will then tell."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_table(path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes: its name may say anything."""
    try:
        with path.open("rb") as file:
            return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError:
        return path.suffix == ".parquet"


def fixed_part(place: str) -> str:
    """A path itself, or of a glob pattern the folder before its first magic part."""
    return str(_fixed_folder(place)) if globbing.has_magic(place) else place


def _fixed_folder(pattern: str) -> Path:
    parts = Path(pattern).parts
    return Path(*parts[: _first_magic(parts)])


def _first_magic(parts: tuple[str, ...]) -> int:
    return next((i for i, part in enumerate(parts) if globbing.has_magic(part)), len(parts) - 1)


class ParquetSource:
    """Rows of a Parquet file whose column `image` holds the bytes of image files."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            InputError: It does not exist or has no such column.
        """
        self._path = path
        try:
            columns = parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise InputError(
                f"{path} is not a readable Parquet file; name a file with a column `image`"
            ) from error
        if "image" not in columns:
            raise InputError(
                f"{path} has columns {', '.join(columns)}; a column `image` with the bytes of "
                f"image files is needed"
            )
        column = parquet.read_table(path, columns=["image"])["image"]
        if pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = compute.struct_field(column, "bytes")
        if not (pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)):
            raise InputError(
                f"{path} has a column `image` of type {column.type}; it must hold the bytes of "
                f"image files, or structs with a field `bytes`"
            )
        self._images = column

    def objects(self) -> list[StoredObject]:
        """One object per row, in the order of the file."""
        sizes = compute.binary_length(self._images).to_pylist()
        return [
            StoredObject(key=f"row_{i:09d}", uri=f"{self._path}#{i}", size_bytes=size or 0)
            for i, size in enumerate(sizes)
        ]

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one row."""
        content: bytes = self._images[int(item.uri.rpartition("#")[2])].as_py() or b""
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Source:
    """Objects below an S3 prefix; endpoint and credentials come from the environment."""

    uri: str

    def objects(self) -> list[StoredObject]:
        """All objects below the prefix, ordered by key.

        Raises:
            StoreRefused, StoreUnavailable: The store refuses, or does not answer.
        """
        _, prefix = bucket_and_key(self.uri)
        found = [
            StoredObject(
                key=bucket_and_key(item.uri)[1][len(prefix) :].lstrip("/"),
                uri=item.uri,
                size_bytes=item.size_bytes,
                etag=item.etag,
            )
            for item in s3.objects_with_prefix(self.uri)
            if not item.uri.endswith("/")
        ]
        return sorted(found, key=lambda item: item.key)

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one object, retried by the client before it gives up.

        Raises:
            ObjectUnreadable: The store refuses this object.
            StoreRefused, StoreUnavailable: As for `objects`.
        """
        return s3.read(item.uri)


def open_source(uri: str) -> ObjectSource:
    """The source that a folder, a file, a glob pattern or an s3:// prefix names.

    Raises:
        InputError: A Parquet file is missing or has no images.
    """
    if is_remote(uri):
        is_whole_bucket = not bucket_and_key(uri)[1]
        return S3Source(uri=uri if is_whole_bucket or uri.endswith("/") else uri + "/")
    path = Path(uri)
    is_table = not path.is_dir() and not globbing.has_magic(uri) and _is_table(path)
    return ParquetSource(path) if is_table else LocalSource(pattern=uri)
