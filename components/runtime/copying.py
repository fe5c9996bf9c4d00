"""Copier: brings files that grow on this node to the store, now and then, in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from components.runtime.storage import StorageError, is_remote, upload

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 15.0
MAX_SHARE = 0.05
"""Copying takes at most this share of the time."""


class Copier:
    """Copies files and directories to their places while it is open, and once more at the end.

    For places that are paths nothing happens. A store that does not answer is warned of: what is
    copied here is for people to look at, and nobody's work waits for it.

    Args:
        places: What is copied, and where to. What does not exist yet is waited for.
    """

    def __init__(
        self, places: Mapping[Path, str], *, interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        self._places = {path: uri for path, uri in places.items() if is_remote(uri)}
        self._interval_seconds = interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="copier", daemon=True)

    def __enter__(self) -> Self:
        if self._places:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._places:
            self._ended.set()
            self._thread.join()
            self._copy()

    def _work(self) -> None:
        pause = self._interval_seconds
        while not self._ended.wait(pause):
            started = time.monotonic()
            self._copy()
            pause = max(self._interval_seconds, (time.monotonic() - started) / MAX_SHARE)

    def _copy(self) -> None:
        try:
            for path, uri in self._places.items():
                if path.exists():
                    upload(path, uri, is_growing=True)
        except StorageError as error:
            logger.warning("not copied to the store: %s", error)
