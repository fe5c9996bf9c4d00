"""What this node's cache knows of its files: their version in the store, and locks on them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.runtime.manifests import write_atomically
from components.runtime.uris import cache_directory


def file_stamp(path: Path) -> list[int]:
    """What changes when a file does: its size and time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def known_copy(path: Path) -> dict[str, object]:
    """Etag of the object that a file of the cache is a copy of, and the file's stamp then."""
    try:
        known: dict[str, object] = json.loads(index_file(path, ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def remember_copy(path: Path, *, etag: str, stamp: list[int]) -> None:
    """Note that a file of the cache is a copy of an object."""
    write_atomically(index_file(path, ".json"), json.dumps({"etag": etag, "stamp": stamp}))


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Let the processes of a node that copy the same file wait for each other."""
    lock = index_file(path, ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def index_file(path: Path, ending: str) -> Path:
    """File of the index that belongs to a path, apart from the cached files."""
    return cache_directory() / ".stored" / f"{path.relative_to(cache_directory())}{ending}"
