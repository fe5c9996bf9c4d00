"""Where images come from: numbered, named bytes of a folder or of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Progress = Callable[[str, int, int], None]
"""Told now and then: what is being done, how many are done, how many there are."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


class ImageFiles(Protocol):
    """Numbered images as bytes; `read` is called from several threads."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What identifies the image to people, unique within the source."""
        ...

    def read(self, number: int) -> bytes:
        """The file's bytes; OSError when it cannot be read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryImages:
    """Images that are already in memory, e.g. from a parquet column."""

    names: Sequence[str]
    contents: Sequence[bytes]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.contents):
            raise ValueError(
                f"{len(self.names)} names do not fit {len(self.contents)} contents; give one name "
                "per image"
            )

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, number: int) -> str:
        """Name as given."""
        return self.names[number]

    def read(self, number: int) -> bytes:
        """Content as given."""
        return self.contents[number]


class FolderImages:
    """Every file below a folder, whatever its ending, named by its path within the folder."""

    def __init__(self, directory: Path) -> None:
        """List a folder.

        Args:
            directory: Listed once, here; names are sorted.

        Raises:
            ValueError: The folder does not exist.
        """
        if not directory.is_dir():
            raise ValueError(f"{directory} is no folder; point to the folder that holds the images")
        self._directory = directory
        self._names = sorted(
            path.relative_to(directory).as_posix()
            for path in directory.rglob("*")
            if path.is_file()
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        """Path within the folder, with slashes."""
        return self._names[number]

    def read(self, number: int) -> bytes:
        """The file's bytes."""
        return (self._directory / self._names[number]).read_bytes()
