"""The storage door: what stages exchange, by path or by s3:// URI.

Stages work in local directories. For a path that is the place itself, and nothing is copied. For a
URI it is a directory of this node's cache, at the same key: `upload` copies from it to the store
and `download` the other way, each only what the other side lacks.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from components.runtime import s3
from components.runtime.manifests import write_atomically
from components.runtime.s3 import RemoteObject, StorageError, StoreUnreachable
from components.runtime.uris import bucket_and_key, cache_directory, is_remote, join_uri, local_path
from dinov2_core.errors import ObjectUnreadable

__all__ = [
    "ObjectUnreadable",
    "StorageError",
    "StoreUnreachable",
    "is_remote",
    "join_uri",
    "local_path",
]

PARALLEL_OBJECTS = 4
"""Objects on the way at a time; large ones go in several parts at a time besides."""

LOCK_FILES = ("lock", "lease.json")
"""Files that say who is at work in a directory; they are never copied."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""


def exists(uri: str) -> bool:
    """Whether there is such a file or directory.

    Raises:
        StorageError: The store does not answer.
    """
    return bool(_objects(uri)) if is_remote(uri) else Path(uri).exists()


def list_names(uri: str) -> list[str]:
    """Paths of all files below a directory, relative to it, in order; none where it is absent.

    Hidden files of a local directory, which are somebody's temporary ones, are left out.
    """
    if is_remote(uri):
        return [_below(item.uri, uri) for item in _objects(uri) if item.uri != uri]
    files = (
        path for path in Path(uri).rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    return sorted(path.relative_to(uri).as_posix() for path in files)


def read_text(uri: str) -> str | None:
    """A small text file; None where there is none.

    Raises:
        StorageError: The store does not answer, or what it gives is damaged.
    """
    if not is_remote(uri):
        path = Path(uri)
        return path.read_text(encoding="utf-8") if path.is_file() else None
    if s3.find(uri) is None:
        return None
    try:
        return s3.read(uri).decode()
    except ObjectUnreadable as error:
        raise StorageError(str(error)) from error


def write_text(uri: str, text: str) -> None:
    """Write a small text file; a reader sees the old one or the new one, never a part."""
    if is_remote(uri):
        s3.write(uri, text.encode())
    else:
        write_atomically(Path(uri), text)


def delete(uri: str) -> None:
    """Remove a file or a directory with all that it holds, from the store and from the spool."""
    if is_remote(uri):
        delete_remote(uri)
    path = local_path(uri)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_remote(uri: str) -> None:
    """Remove from a store what a URI names, and leave the spool as it is."""
    s3.delete([item.uri for item in _objects(uri)])


def download_file(uri: str, path: Path) -> None:
    """Bring one object to a path, verified, whatever is there.

    Raises:
        ObjectUnreadable: There is no such object, or it stays damaged.
        StorageError: The store does not answer.
    """
    s3.download(uri, path)


def download(uri: str, *, progress: Progress = _silent) -> Path:
    """Where a file or directory is on this node, after bringing there what the spool lacks.

    Every object is verified as it arrives. Ranks of one node may ask at the same time: one
    brings, the others wait.

    Args:
        uri: A path, which is returned as it is, or a URI.
        progress: Told how far it is.

    Raises:
        StorageError: There is no such object, one is damaged, or the store does not answer.
    """
    path = local_path(uri)
    if not is_remote(uri):
        return path
    with _one_at_a_time(path):
        found = _objects(uri)
        if not found:
            raise StorageError(f"{uri} does not exist; run the stage that writes it first")
        lacking = [item for item in found if not _is_here(item)]
        total, done = sum(item.size_bytes for item in lacking), 0
        progress(done, total)
        with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
            for item in pool.map(_bring, lacking):
                done += item.size_bytes
                progress(done, total)
    return path


def download_if_newer(uri: str) -> None:
    """Bring a file that somebody on another node may have gone on with.

    A file of the spool that grew out of the store's one stays; where there is none, nothing
    happens.

    Raises:
        StorageError: As for `download`.
    """
    for item in _objects(uri) if is_remote(uri) else ():
        path = local_path(item.uri)
        if not path.exists() or _remembered(path).get("etag") != item.etag:
            _bring(item)


def upload(
    path: Path, uri: str, *, leaving_out: Collection[str] = (), is_growing: bool = False
) -> None:
    """Copy a file or a directory to its place, as far as it changed; nothing where it lies there.

    Hidden files and folders of a directory stay behind.

    Args:
        path: In the spool, at the place that belongs to the URI.
        uri: Where it goes.
        leaving_out: Names in the directory that are not sent.
        is_growing: Whether somebody may write to a file meanwhile: what it holds now is sent.

    Raises:
        StorageError: The store does not take it.
    """
    if not is_remote(uri):
        return
    if not path.is_dir():
        _send_file(path, uri, is_growing=is_growing)
        return
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and _is_sent(file.relative_to(path), leaving_out)
    ]

    def send_one(file: Path) -> None:
        with suppress(FileNotFoundError):  # somebody's temporary file
            _send_file(
                file, join_uri(uri, file.relative_to(path).as_posix()), is_growing=is_growing
            )

    with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
        list(pool.map(send_one, files))


def download_object(uri: str, *, directory: Path) -> Path:
    """Bring the object of an s3:// URI into a directory; done once for each content.

    Returns:
        The file, named by the object's etag and with its suffix.

    Raises:
        StorageError: There is no such object, it is damaged, or the store does not answer.
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
        StorageError: There is no such object, or the store does not answer.
    """
    found = s3.find(uri)
    if found is None:
        raise StorageError(f"S3 answered 404 for {uri}; check bucket, key and permissions")
    return found


def _objects(uri: str) -> list[RemoteObject]:
    """The object of a URI, or all below it, ordered; hidden ones are the spool's own business."""
    below = uri.rstrip("/") + "/"
    found = [
        item
        for item in s3.objects_with_prefix(uri.rstrip("/"))
        if item.uri == uri or (item.uri.startswith(below) and not item.uri.endswith("/"))
    ]
    return sorted(found, key=lambda item: item.uri)


def _below(uri: str, root: str) -> str:
    return uri[len(root.rstrip("/")) + 1 :]


def _is_sent(relative: Path, leaving_out: Collection[str]) -> bool:
    is_hidden = any(part.startswith(".") for part in relative.parts)
    return not is_hidden and relative.parts[0] not in (*LOCK_FILES, *leaving_out)


def _send_file(path: Path, uri: str, *, is_growing: bool) -> None:
    """Send a file unless it is as it was when it was sent or fetched."""
    with _one_at_a_time(path):
        seen = _seen(path)
        if _remembered(path).get("seen") == seen and s3.find(uri) is not None:
            return
        if seen[0] <= s3.PART_BYTES:
            etag = s3.write(uri, path.read_bytes())
        elif is_growing:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sending") as folder:
                etag = s3.upload(Path(shutil.copyfile(path, Path(folder) / path.name)), uri)
        else:
            etag = s3.upload(path, uri)
        _remember(path, etag=etag, seen=seen)


def _bring(item: RemoteObject) -> RemoteObject:
    path = local_path(item.uri)
    etag = _download(item.uri, path)
    _remember(path, etag=etag, seen=_seen(path))
    return item


def _download(uri: str, path: Path) -> str:
    try:
        return s3.download(uri, path)
    except ObjectUnreadable as error:
        raise StorageError(
            f"{error}; run the stage that wrote it again, without the cache (--no-cache)"
        ) from error


def _is_here(item: RemoteObject) -> bool:
    """Whether the spool holds this version, untouched since it was sent or fetched."""
    path = local_path(item.uri)
    if not path.exists():
        return False
    return _remembered(path) == {"etag": item.etag, "seen": _seen(path)}


def _seen(path: Path) -> list[int]:
    """What changes when a file does: its size and time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _beside(path: Path, ending: str) -> Path:
    """Where the door keeps what it knows of a place: in the spool, away from the files."""
    return cache_directory() / ".stored" / f"{path.relative_to(cache_directory())}{ending}"


def _remembered(path: Path) -> dict[str, object]:
    """Etag that a file of the spool had in the store, and how the file looked then."""
    try:
        known: dict[str, object] = json.loads(_beside(path, ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _remember(path: Path, *, etag: str, seen: list[int]) -> None:
    write_atomically(_beside(path, ".json"), json.dumps({"etag": etag, "seen": seen}))


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let the processes of a node that want the same place wait for each other."""
    lock = _beside(path, ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
