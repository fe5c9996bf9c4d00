"""Objects below an S3 prefix, and one object as a file that can be read anywhere in it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from components.runtime import s3
from components.runtime.image_sources.source import StoredObject, check_size, folder_label
from components.runtime.s3 import RemoteObject
from components.runtime.uris import bucket_and_key


class BucketSource:
    """Objects below a prefix; endpoint and credentials come from the environment."""

    def __init__(self, uri: str) -> None:
        """Take a prefix.

        Args:
            uri: `s3://BUCKET` or `s3://BUCKET/PREFIX`.
        """
        is_whole_bucket = not bucket_and_key(uri)[1]
        self._uri = uri if is_whole_bucket or uri.endswith("/") else uri + "/"

    def objects(self) -> list[StoredObject]:
        """All objects below the prefix, ordered by key."""
        _, prefix = bucket_and_key(self._uri)
        found = [
            StoredObject(
                key=bucket_and_key(item.uri)[1][len(prefix) :].lstrip("/"),
                uri=item.uri,
                size_bytes=item.size_bytes,
                etag=item.etag,
            )
            for item in s3.objects_with_prefix(self._uri)
            if not item.uri.endswith("/")
        ]
        return sorted(found, key=lambda item: item.key)

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one object, retried by the client before it gives up."""
        check_size(item.uri, item.size_bytes)
        return s3.read(item.uri)

    def labels(self, items: Sequence[StoredObject]) -> Sequence[str | None]:
        """The first folder of each object below the prefix."""
        return [folder_label(item) for item in items]


class RemoteFile(io.RawIOBase):
    """One object of a store, of which only the parts that are read are transferred."""

    def __init__(self, found: RemoteObject) -> None:
        """Start at the first byte.

        Args:
            found: The object; when it is replaced, reading fails.
        """
        self._found = found
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Next byte to be read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte, counted from the start, from here or from the end."""
        start = (0, self._position, self._found.size_bytes)[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer as far as the object goes; gives the bytes that were read."""
        size = min(len(buffer), self._found.size_bytes - self._position)
        if size <= 0:
            return 0
        content = s3.read_range(self._found, start=self._position, size=size)
        buffer[:size] = content
        self._position += size
        return size
