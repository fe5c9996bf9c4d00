"""Images of several sources as numbered files, and a digest of their content."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from components.runtime.image_sources.opening import open_source
from components.runtime.image_sources.source import ImageSource, StoredObject, content_digest
from components.runtime.manifests import digest_of


class StoredImages:
    """Files of one or more sources, numbered one after the other."""

    def __init__(self, uris: Sequence[str]) -> None:
        """List the sources.

        Args:
            uris: Folders, glob patterns, Parquet files or s3:// prefixes.

        Raises:
            InputError: One does not exist or cannot be listed.
        """
        self.uris = tuple(uris)
        self._sources: list[ImageSource] = [open_source(uri) for uri in uris]
        self._items: list[Sequence[StoredObject]] = [source.objects() for source in self._sources]
        self._ends = list(accumulate(len(items) for items in self._items))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, number: int) -> str:
        """Path within its source; with several sources, preceded by the number of the source."""
        source, item = self._find(number)
        return f"{source}/{item.key}" if len(self.uris) > 1 else item.key

    def size_bytes(self, number: int) -> int:
        """Size when the source was listed; 0 for rows of a table."""
        return self._find(number)[1].size_bytes

    def read(self, number: int) -> bytes:
        """Content of the file."""
        source, item = self._find(number)
        return self._sources[source].read(item)

    def digest(self, *, num_threads: int) -> str:
        """Digest of names and contents; of an object store, of its own digests of the contents."""
        with ThreadPoolExecutor(num_threads) as pool:
            contents = list(pool.map(self._content_digest, range(len(self))))
        return digest_of([(self.name(i), content) for i, content in enumerate(contents)])

    def _content_digest(self, number: int) -> str:
        source, item = self._find(number)
        return content_digest(self._sources[source], item)

    def _find(self, number: int) -> tuple[int, StoredObject]:
        source = bisect_right(self._ends, number)
        first = self._ends[source - 1] if source else 0
        return source, self._items[source][number - first]
