"""Files of a folder, or those that a glob pattern matches."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from components.runtime.image_sources.source import (
    MAX_IMAGE_BYTES,
    StoredObject,
    check_size,
    folder_label,
)
from dinov2_core.errors import InputError, ObjectUnreadable

ANY_DEPTH = "**"


class FolderSource:
    """Files below a folder, or those that a glob pattern matches.

    Hidden files and folders are left out, links are followed, and each real folder counts once,
    under the first of its names. A name that is not UTF-8 appears with its bytes escaped.
    """

    def __init__(self, pattern: str) -> None:
        """Find the folder.

        Args:
            pattern: A folder, a file or a glob pattern, in which `**` stands for any folders.

        Raises:
            InputError: There is nothing of that name.
        """
        path = Path(pattern)
        self._root = path
        self._parts: tuple[str, ...] = (ANY_DEPTH,)
        self._paths_of_escaped: dict[str, Path] = {}
        if path.is_dir():
            return
        if path.exists():
            self._root, self._parts = path.parent, (glob.escape(path.name),)
            return
        if not glob.has_magic(pattern):
            raise InputError(
                f"folder {pattern} does not exist; name an existing folder or file, a glob "
                f"pattern, a Parquet file or an s3:// prefix"
            )
        self._root = _fixed_folder(pattern)
        self._parts = path.parts[len(self._root.parts) :]

    def objects(self) -> list[StoredObject]:
        """All files, ordered by path."""
        items = []
        for path in _matching_files(self._root, self._parts):
            uri = _escaped(str(path))
            if uri != str(path):
                self._paths_of_escaped[uri] = path
            key = _escaped(path.relative_to(self._root).as_posix())
            items.append(StoredObject(key=key, uri=uri, size_bytes=_size(path)))
        return sorted(items, key=lambda item: item.key)

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one file."""
        path = self._paths_of_escaped.get(item.uri, Path(item.uri))
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ObjectUnreadable(
                    f"{item.uri} is a pipe, a socket or a device and is not opened; remove it"
                )
            check_size(item.uri, status.st_size)
            with path.open("rb") as file:
                content = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise ObjectUnreadable(f"{item.uri} cannot be read ({error.strerror})") from error
        check_size(item.uri, len(content))
        return content

    def labels(self, items: Sequence[StoredObject]) -> Sequence[str | None]:
        """The first folder of each file below the root."""
        labels = [folder_label(item) for item in items]
        if self._parts == (ANY_DEPTH,):
            names = {_escaped(entry.name) for entry in _entries(self._root) if _is_folder(entry)}
            empty = sorted(name for name in names - {*labels} if not name.startswith("."))
            if empty:
                raise InputError(
                    f"class folder {self._root / empty[0]} has no image of its own (a folder that "
                    "links lead to twice counts once); add images or remove the folder"
                )
        return labels


def fixed_part(uri: str) -> str:
    """A path itself, or of a glob pattern the folder before its first magic part."""
    return str(_fixed_folder(uri)) if glob.has_magic(uri) else uri


def _fixed_folder(pattern: str) -> Path:
    parts = Path(pattern).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:magic])


def _matching_files(root: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Files below a folder whose path matches the parts of a pattern.

    A folder is entered once for each part, whatever links lead to it, so that links to a folder
    above end.
    """
    entered: set[tuple[int, int, int]] = set()
    waiting = [(root, parts)] if root.is_dir() else []
    while waiting:
        folder, parts = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino, len(parts)) in entered:
            continue
        entered.add((status.st_dev, status.st_ino, len(parts)))
        part, rest = parts[0], parts[1:]
        is_deep = part == ANY_DEPTH
        below = parts if is_deep else rest
        matching = [entry for entry in _entries(folder) if is_deep or fnmatchcase(entry.name, part)]
        if not part.startswith("."):
            matching = [entry for entry in matching if not entry.name.startswith(".")]
        folders = [Path(entry) for entry in matching if below and _is_folder(entry)]
        waiting += [(found, below) for found in reversed(folders)]
        if is_deep and rest:
            waiting.append((folder, rest))
        if not rest:
            yield from (Path(entry) for entry in matching if not _is_folder(entry))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, ordered by name.

    Raises:
        InputError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"folder {_escaped(str(folder))} cannot be read ({error.strerror}); check its "
            "permissions"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(path: Path) -> int:
    """Bytes of a file; 0 where that cannot be known, which reading will then tell."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _escaped(name: str) -> str:
    r"""A name with bytes that are not UTF-8 written as `\xE9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
