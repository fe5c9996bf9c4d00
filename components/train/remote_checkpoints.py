"""StoredCheckpoints: checkpoints in an object store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.runtime import storage
from components.runtime.storage import is_remote, join_uri, read_text
from components.train.job import Job
from dinov2_core.distributed.checkpoint import MARKER
from dinov2_core.errors import ObjectUnreadable

logger = logging.getLogger(__name__)

PARALLEL_FILES = 4


class StoredCheckpoints:
    """Folders of checkpoints in a store; implements `RemoteCheckpoints`.

    Before a checkpoint becomes valid there, so do the records that it must not be ahead of.

    Args:
        uri: Of all checkpoints.
        records: Files and where they go, such as the metrics of the steps so far.
    """

    def __init__(self, uri: str, *, records: dict[Path, str]) -> None:
        self._uri = uri
        self._records = records

    def markers(self) -> dict[str, str]:
        """Text of the marker of every folder, by the folder's name; empty without a marker."""
        found = storage.list_names(self._uri)
        marked = {name.rpartition("/")[0] for name in found if name.endswith(f"/{MARKER}")}
        return {
            folder: (read_text(join_uri(self._uri, folder, MARKER)) or "")
            if folder in marked
            else ""
            for folder in {name.partition("/")[0] for name in found}
        }

    def upload(self, files: Sequence[Path]) -> None:
        """Copy files to the store, several at a time."""
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(lambda file: storage.upload(file, self._uri_of(file)), files))

    def download(self, files: Sequence[Path]) -> None:
        """Copy files from the store; those that are missing or damaged there are left out."""
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(self._download, files))

    def commit(self, marker: Path) -> None:
        """Upload the records, then the marker."""
        for record, uri in self._records.items():
            if record.exists():
                storage.upload(record, uri, is_growing=True)
        storage.upload(marker, self._uri_of(marker))

    def invalidate(self, folder: str) -> None:
        """Remove a folder's marker."""
        storage.delete_remote(join_uri(self._uri, folder, MARKER))

    def remove(self, folder: str) -> None:
        """Remove a folder, its marker first."""
        self.invalidate(folder)
        storage.delete_remote(join_uri(self._uri, folder))

    def _uri_of(self, file: Path) -> str:
        return join_uri(self._uri, file.parent.name, file.name)

    def _download(self, file: Path) -> None:
        try:
            storage.download_file(self._uri_of(file), file)
        except ObjectUnreadable as error:
            logger.warning("%s", error)


def remote_checkpoints_of(job: Job) -> StoredCheckpoints | None:
    """Store of a job's checkpoints; None where all nodes see the directory."""
    if not is_remote(job.directory):
        return None
    records = {job.metrics: job.uri_of(job.metrics)}
    return StoredCheckpoints(job.uri_of(job.checkpoints), records=records)
