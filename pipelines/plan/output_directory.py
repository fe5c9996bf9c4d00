"""The directory that `dinopipe plan -o` writes, and the index of what it wrote there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from components.runtime.manifests import digest_of_file, write_atomically
from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import InputError

INDEX = ".dinopipe-plan.json"

FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*\.yaml$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Index(Frozen):
    """What plans have written into a directory; no other file there is touched."""

    files: dict[FileName, tuple[Digest, ...]]
    """Digests of a file's content by its name; two while a plan replaces one by the other."""


def write_plan(files: Mapping[str, str], directory: Path) -> None:
    """Write the files of a plan, and remove those that an earlier plan wrote and this one lacks.

    A plan that is killed leaves files of either plan and an index that names both, so that the next
    one can go on.

    Args:
        files: Text by file name.
        directory: Made if it does not exist; may hold other files.

    Raises:
        InputError: A file that would be replaced or removed is not as a plan wrote it, or the index
            is damaged; nothing has been written.
    """
    earlier = _read_index(directory).files
    for name in sorted({*files, *earlier}):
        _check_written_by_plan(directory / name, earlier.get(name, ()))
    planned = {name: (hashlib.sha256(text.encode()).hexdigest(),) for name, text in files.items()}
    both = {name: earlier.get(name, ()) + planned.get(name, ()) for name in {*earlier, *planned}}
    _write_index(both, directory)
    for name, text in files.items():
        write_atomically(directory / name, text)
    for name in earlier.keys() - files.keys():
        (directory / name).unlink(missing_ok=True)
    _write_index(planned, directory)


def read_plan(directory: Path, *, needs_index: bool = True) -> dict[str, str]:
    """The files of an earlier plan, text by file name; none where there is no such directory.

    Args:
        directory: As given with -o.
        needs_index: Whether a directory without an index has no plan; else all its *.yaml are one.

    Raises:
        InputError: The index is damaged, or a file is not text.
    """
    paths = [directory / name for name in _read_index(directory).files]
    if not paths and not needs_index:
        paths = sorted(directory.glob("*.yaml"))
    return {path.name: _text(path) for path in paths if path.is_file()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error}); name another plan") from error


def _read_index(directory: Path) -> _Index:
    path = directory / INDEX
    if not path.is_symlink() and not path.exists():
        return _Index(files={})
    try:
        if path.is_symlink():
            raise ValueError("it is a symbolic link")
        return _Index.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}), and without it no file of {directory} may be replaced; "
            "remove it together with the files of that plan, or name another directory"
        ) from error


def _write_index(files: Mapping[str, tuple[str, ...]], directory: Path) -> None:
    index = _Index(files=dict(sorted(files.items())))
    write_atomically(directory / INDEX, index.model_dump_json(indent=2) + "\n")


def _check_written_by_plan(path: Path, digests: tuple[str, ...]) -> None:
    if not path.is_symlink() and not path.exists():
        return
    if path.is_symlink() or not path.is_file() or digest_of_file(path) not in digests:
        raise InputError(
            f"{path} was not written by dinopipe plan, or has changed since; move it away, or name "
            "another directory with -o"
        )
