"""The pile as curation sees it: numbered files from any source, and a digest of their content."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from components.runtime.image_sources.opening import open_source
from components.runtime.image_sources.source import ImageSource, StoredObject, content_digest
from components.runtime.manifests import digest_of


class StoredImages:
    """Files of one or more places, numbered one after the other."""

    def __init__(self, places: Sequence[str]) -> None:
        """List the places.

        Args:
            places: Folders, glob patterns, Parquet files or s3:// prefixes.

        Raises:
            InputError: A place does not exist or cannot be listed.
        """
        self.places = tuple(places)
        self._sources: list[ImageSource] = [open_source(place) for place in places]
        self._items: list[Sequence[StoredObject]] = [source.objects() for source in self._sources]
        self._ends = list(accumulate(len(items) for items in self._items))
        self._prefixes = [f"{i}/" if len(places) > 1 else "" for i in range(len(places))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, number: int) -> str:
        """Path below its place; with several places, preceded by the place's number."""
        place, item = self._find(number)
        return self._prefixes[place] + item.key

    def read(self, number: int) -> bytes:
        """The file's bytes."""
        place, item = self._find(number)
        return self._sources[place].read(item)

    def digest(self, *, num_threads: int) -> str:
        """Digest of names and contents; of an object store, of what it says of the contents."""
        with ThreadPoolExecutor(num_threads) as pool:
            contents = list(pool.map(self._content_digest, range(len(self))))
        return digest_of([(self.name(i), content) for i, content in enumerate(contents)])

    def _content_digest(self, number: int) -> str:
        place, item = self._find(number)
        return content_digest(self._sources[place], item)

    def _find(self, number: int) -> tuple[int, StoredObject]:
        place = bisect_right(self._ends, number)
        first = self._ends[place - 1] if place else 0
        return place, self._items[place][number - first]
