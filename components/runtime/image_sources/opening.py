"""Which source a URI names; a new kind of source is a class of its own and a case here.

The libraries of tables and stores take half a second to load, so each is loaded where it is needed.
"""

from __future__ import annotations

from pathlib import Path

from components.runtime.image_sources.folder import FolderSource
from components.runtime.image_sources.source import ImageSource
from components.runtime.uris import bucket_and_key, is_remote

MAGIC = b"PAR1"
"""First bytes of a Parquet file."""


def open_source(uri: str) -> ImageSource:
    """The source that a folder, a glob pattern, a Parquet file or an s3:// prefix names.

    Raises:
        InputError: There is nothing of that name, or a Parquet file has no images.
        AccessRefused: The store refuses it.
        TransientError: The store does not answer.
    """
    if is_remote(uri):
        return _open_remote(uri)
    path = Path(uri)
    if path.is_file() and _begins_as_table(path):
        from components.runtime.image_sources.table import TableSource

        return TableSource(uri, file=path)
    return FolderSource(uri)


def _open_remote(uri: str) -> ImageSource:
    from components.runtime import s3
    from components.runtime.image_sources.bucket import BucketSource, RemoteFile

    found = s3.find(uri) if bucket_and_key(uri)[1] and not uri.endswith("/") else None
    if found is not None and RemoteFile(found).read(len(MAGIC)) == MAGIC:
        from components.runtime.image_sources.table import TableSource

        return TableSource(uri, file=RemoteFile(found), etag=found.etag)
    return BucketSource(uri)


def _begins_as_table(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return path.suffix == ".parquet"
