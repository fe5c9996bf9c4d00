"""Errors of files and disks, with the path and the space that is left."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2_core.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Let a full disk end a `with` block with an error that names it.

    Raises:
        InputError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise explained(error, directory=directory) from error


def explained(error: OSError, *, directory: Path | str) -> InputError:
    """An error that names the file or directory, and for a full disk how much is free.

    Args:
        error: Of the operating system; it often has no file name.
        directory: What was written to, if the error does not say.
    """
    path = Path(os.fsdecode(error.filename) if error.filename else directory)
    reason = error.strerror or str(error)
    if error.errno not in FULL:
        return InputError(f"{path}: {reason}; choose another path, or change its permissions")
    parents = (path.absolute(), *path.absolute().parents)
    free = shutil.disk_usage(next(item for item in parents if item.exists())).free / 2**20
    return InputError(
        f"{path}: {reason} ({free:.0f} MiB free on its file system); free some, or choose another "
        "directory"
    )
