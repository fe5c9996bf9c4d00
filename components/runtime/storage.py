"""Storage: what stages exchange, by path or by s3:// URI.

Stages work in local directories. A path is its own directory, and nothing is copied. A URI has a
directory in this node's cache, at the same key: `upload` copies from it to the store and `download`
the other way, each only what the other side does not have.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path

from components.runtime import s3
from components.runtime.cache_index import exclusively, file_stamp, known_copy, remember_copy
from components.runtime.manifests import write_atomically
from components.runtime.s3 import RemoteObject
from components.runtime.uris import bucket_and_key, is_remote, join_uri, local_path
from dinov2_core.errors import InputError, ObjectUnreadable

__all__ = ["is_remote", "join_uri", "local_path"]

PARALLEL_OBJECTS = 4
"""Objects that are copied at a time; large ones go in several parts at a time besides."""

LOCK_FILES = ("lock", "lease.json")
"""Files that say who is at work in a directory; they are never copied."""

BytesProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def exists(uri: str) -> bool:
    """Whether there is such a file or directory.

    Raises:
        StoreRefused, StoreUnavailable: The store refuses, or does not answer; so do all others.
    """
    return bool(_objects(uri)) if is_remote(uri) else Path(uri).exists()


def list_names(uri: str) -> list[str]:
    """Paths of all files below a directory, relative to it, in order; none where it is absent.

    Hidden files of a local directory, which are temporary ones of some process, are left out.
    """
    if is_remote(uri):
        below = len(uri.rstrip("/")) + 1
        return [item.uri[below:] for item in _objects(uri) if item.uri != uri]
    files = (
        path for path in Path(uri).rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    return sorted(path.relative_to(uri).as_posix() for path in files)


def read_text(uri: str) -> str | None:
    """A small text file; None where there is none.

    Raises:
        ObjectUnreadable: It may not be read, or is damaged.
    """
    if not is_remote(uri):
        path = Path(uri)
        return path.read_text(encoding="utf-8") if path.is_file() else None
    return None if s3.find(uri) is None else s3.read(uri).decode()


def write_text(uri: str, text: str) -> None:
    """Write a small text file; a reader sees the old one or the new one, never a part.

    Raises:
        LeaseLost: Another run works there now; so do all that write or remove.
    """
    if is_remote(uri):
        s3.write(uri, text.encode())
    else:
        write_atomically(Path(uri), text)


def delete(uri: str) -> None:
    """Remove a file or a directory with all that it holds, from the store and from the cache."""
    if is_remote(uri):
        delete_remote(uri)
    path = local_path(uri)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_remote(uri: str) -> None:
    """Remove from a store what a URI names, and leave the cache as it is."""
    s3.delete([item.uri for item in _objects(uri)])


def download_file(uri: str, path: Path) -> None:
    """Copy one object to a path, verified, whatever is there.

    Raises:
        ObjectUnreadable: There is no such object, it may not be read, or it is damaged.
    """
    s3.download(uri, path)


def download(uri: str, *, progress: BytesProgress | None = None) -> Path:
    """Path on this node of a file or directory, whose objects are copied there as needed.

    Every object is verified as it arrives. Ranks of one node may ask at the same time: one
    downloads, the others wait.

    Args:
        uri: A path, which is returned as it is, or a URI.
        progress: Called before the first object and after each.

    Raises:
        InputError: There is no such object, or one is damaged.
    """
    path = local_path(uri)
    if not is_remote(uri):
        return path
    with exclusively(path):
        found = _objects(uri)
        if not found:
            raise InputError(f"{uri} does not exist; run the stage that writes it first")
        missing = [item for item in found if not _is_current(item)]
        total, done = sum(item.size_bytes for item in missing), 0
        if progress is not None:
            progress(done, total)
        with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
            for item in pool.map(_download_to_cache, missing):
                done += item.size_bytes
                if progress is not None:
                    progress(done, total)
    return path


def download_if_newer(uri: str) -> None:
    """Download a file that another node may have appended to since this one had it.

    A file of the cache that grew out of the store's one stays; where there is none, nothing
    happens.

    Raises:
        InputError: It is damaged.
    """
    for item in _objects(uri) if is_remote(uri) else ():
        path = local_path(item.uri)
        if not path.exists() or known_copy(path).get("etag") != item.etag:
            _download_to_cache(item)


def upload(
    path: Path, uri: str, *, leaving_out: Collection[str] = (), is_growing: bool = False
) -> None:
    """Copy a file or a directory to its URI, as far as it changed; a path needs no copy.

    Hidden files and folders of a directory stay behind.

    Args:
        path: In the cache, at the path that belongs to the URI.
        uri: Where it goes.
        leaving_out: Names in the directory that are not copied.
        is_growing: Whether somebody may write to a file meanwhile: what it holds now is copied.
    """
    if not is_remote(uri):
        return
    if not path.is_dir():
        _upload_file(path, uri, is_growing=is_growing)
        return

    def upload_one(file: Path) -> None:
        with suppress(FileNotFoundError):  # a temporary file of some process
            target = join_uri(uri, file.relative_to(path).as_posix())
            _upload_file(file, target, is_growing=is_growing)

    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and _is_copied(file.relative_to(path), leaving_out)
    ]
    contexts = [copy_context() for _ in files]  # the retry policy of this thread
    with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
        list(pool.map(lambda context, file: context.run(upload_one, file), contexts, files))


def download_object(uri: str, *, directory: Path) -> Path:
    """Copy the object of an s3:// URI into a directory; done once for each content.

    Returns:
        The file, named by the object's etag and with its suffix.

    Raises:
        InputError: There is no such object, or it is damaged.
    """
    item = find_object(uri)
    suffix = Path(bucket_and_key(uri)[1]).suffix
    path = directory / f"{item.etag.strip(chr(34))}{suffix}"
    if not path.exists():
        _download(uri, path)
    return path


def find_object(uri: str) -> RemoteObject:
    """Size and etag of the one object that an s3:// URI names.

    Raises:
        InputError: There is no such object.
    """
    found = s3.find(uri)
    if found is None:
        raise InputError(f"S3 answered 404 for {uri}; check bucket, key and permissions")
    return found


def _objects(uri: str) -> list[RemoteObject]:
    """The object of a URI, or all below it, ordered."""
    below = uri.rstrip("/") + "/"
    found = [
        item
        for item in s3.objects_with_prefix(uri.rstrip("/"))
        if item.uri == uri or (item.uri.startswith(below) and not item.uri.endswith("/"))
    ]
    return sorted(found, key=lambda item: item.uri)


def _is_copied(relative: Path, leaving_out: Collection[str]) -> bool:
    is_hidden = any(part.startswith(".") for part in relative.parts)
    return not is_hidden and relative.parts[0] not in (*LOCK_FILES, *leaving_out)


def _upload_file(path: Path, uri: str, *, is_growing: bool) -> None:
    """Copy a file unless it is as it was when it was last copied."""
    with exclusively(path):
        stamp = file_stamp(path)
        if known_copy(path).get("stamp") == stamp and s3.find(uri) is not None:
            return
        if path.stat().st_size <= s3.PART_BYTES:
            etag = s3.write(uri, path.read_bytes())
        elif is_growing:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".uploading") as folder:
                etag = s3.upload(Path(shutil.copyfile(path, Path(folder) / path.name)), uri)
        else:
            etag = s3.upload(path, uri)
        remember_copy(path, etag=etag, stamp=stamp)


def _download_to_cache(item: RemoteObject) -> RemoteObject:
    path = local_path(item.uri)
    etag = _download(item.uri, path)
    remember_copy(path, etag=etag, stamp=file_stamp(path))
    return item


def _download(uri: str, path: Path) -> str:
    try:
        return s3.download(uri, path)
    except ObjectUnreadable as error:
        raise InputError(
            f"{error}; run the stage that wrote it again, without the cache (--no-cache)"
        ) from error


def _is_current(item: RemoteObject) -> bool:
    """Whether the cache holds this version, untouched since it was copied."""
    path = local_path(item.uri)
    return path.exists() and known_copy(path) == {"etag": item.etag, "stamp": file_stamp(path)}
