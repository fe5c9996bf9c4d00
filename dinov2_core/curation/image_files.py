"""The files that curation reads, whatever stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Progress = Callable[[str, int, int], None]
"""Called now and then with the name of the work, how much of it is done, and how much there is."""


def no_progress(work: str, done: int, total: int) -> None:
    """Report nothing."""


class ImageFiles(Protocol):
    """Numbered files; `read` is called from several threads."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What identifies the file to users, unique within the set."""
        ...

    def size_bytes(self, number: int) -> int:
        """Size of the file when the set was listed."""
        ...

    def read(self, number: int) -> bytes:
        """Content of the file; OSError or ObjectUnreadable if this file cannot be read."""
        ...
