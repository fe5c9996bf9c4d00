"""Leases: an object store's places that one run at a time works in."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from components.runtime import s3
from components.runtime.storage import StorageError, read_text

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""After so long without a sign of life a place is free again."""
RENEWALS = 4
"""How often a lease is renewed in its time."""


@contextmanager
def leased(uri: str, *, owner: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold a place in a store; clocks of those who want it should agree to seconds.

    A restart of the holder takes its own lease over at once.

    Args:
        uri: Object that says who holds the place.
        owner: Who holds it, in words, such as `run RUN_ID`.
        seconds: How long the place stays held after the holder's death.

    Raises:
        ValueError: Another run holds it.
        StorageError: The store does not answer.
    """
    lease = _Lease(uri, owner=owner, seconds=seconds)
    lease.take()
    ended = threading.Event()
    thread = threading.Thread(target=lease.keep, args=(ended,), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.release()


class _Lease:
    def __init__(self, uri: str, *, owner: str, seconds: float) -> None:
        self._uri = uri
        self._owner = owner
        self._seconds = seconds
        self._etag: str = ""

    def take(self) -> None:
        found = s3.find(self._uri)
        if found is not None:
            self._refuse_unless_free(read_text(self._uri))
        try:
            self._write(replaces=found.etag if found else "")
        except s3.ObjectTaken:  # this very moment
            self._refuse_unless_free(read_text(self._uri))
            self._write(replaces=None)

    def keep(self, ended: threading.Event) -> None:
        while not ended.wait(self._seconds / RENEWALS):
            try:
                self._write(replaces=self._etag)
            except s3.ObjectTaken:
                logger.warning("another run has taken %s over; two are at work there", self._uri)
                return
            except StorageError as error:
                logger.warning("the lease could not be renewed: %s", error)

    def release(self) -> None:
        try:
            found = s3.find(self._uri)
            if found is not None and found.etag == self._etag:
                s3.delete([self._uri])
        except StorageError as error:
            logger.warning("the lease could not be given back, it ends by itself: %s", error)

    def _write(self, *, replaces: str | None) -> None:
        text = json.dumps({"owner": self._owner, "until": time.time() + self._seconds})
        self._etag = s3.write(self._uri, text.encode(), replaces=replaces)

    def _refuse_unless_free(self, text: str | None) -> None:
        try:
            lease = json.loads(text or "{}")
            owner, left = str(lease["owner"]), float(lease["until"]) - time.time()
        except (ValueError, KeyError, TypeError):
            return
        if owner != self._owner and left > 0:
            place = self._uri.rpartition("/")[0]
            raise ValueError(
                f"{place} is in use by {owner}; wait for that to end, or, if it was killed, for "
                f"{left:.0f} s"
            )
