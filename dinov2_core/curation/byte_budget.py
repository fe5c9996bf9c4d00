"""A limit on the bytes that several threads hold at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """Makes threads wait until what they are about to hold fits beside what others hold."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Count bytes as held within the block; more than the limit is held by one thread alone."""
        num_bytes = min(num_bytes, self._limit_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes + num_bytes <= self._limit_bytes)
            self._held_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= num_bytes
                self._changed.notify_all()
