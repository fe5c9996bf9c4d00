"""Mirror: a second place for checkpoints, for nodes that share no file system."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Mirror(Protocol):
    """Folders of files in a place that every node sees.

    With one, each node has a directory of checkpoints of its own, which holds at least what its
    ranks wrote. Methods raise when the place does not answer; they may be called from a thread.
    """

    def folders(self) -> dict[str, str]:
        """Text of the marker of every folder, by the folder's name; empty without a marker."""
        ...

    def send(self, files: Sequence[Path]) -> None:
        """Copy files there, each into the folder that is named like its own one here."""
        ...

    def bring(self, files: Sequence[Path]) -> None:
        """Copy files from there; those that are missing or damaged there stay away."""
        ...

    def mark(self, marker: Path) -> None:
        """Copy a folder's marker there, which makes the folder valid."""
        ...

    def unmark(self, folder: str) -> None:
        """Remove a folder's marker."""
        ...

    def remove(self, folder: str) -> None:
        """Remove a folder, its marker first."""
        ...


def is_first_of_node() -> bool:
    """Whether this rank looks after the files of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
