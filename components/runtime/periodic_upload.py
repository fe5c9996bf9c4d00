"""PeriodicUpload: copies files that grow on this node to the store, in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from components.runtime.retry import ONCE, retrying_with
from components.runtime.storage import is_remote, upload
from dinov2_core.errors import DinopipeError

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 15.0
MAX_SHARE = 0.05
"""Copying takes at most this share of the time."""


class PeriodicUpload:
    """Copies files and directories while it is open, and once more at the end.

    For targets that are paths nothing happens. A failure is a warning: what is copied here is for
    users to watch, and no work waits for it.

    Args:
        targets: URI of each file or directory. One that does not exist yet is copied later.
        interval_seconds: Shortest time between two copies.
    """

    def __init__(
        self, targets: Mapping[Path, str], *, interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        self._targets = {path: uri for path, uri in targets.items() if is_remote(uri)}
        self._interval_seconds = interval_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="upload", daemon=True)

    def __enter__(self) -> Self:
        if self._targets:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._targets:
            self._closed.set()
            self._thread.join()
            self._copy()

    def _repeat(self) -> None:
        pause = self._interval_seconds
        while not self._closed.wait(pause):
            started = time.monotonic()
            self._copy()
            pause = max(self._interval_seconds, (time.monotonic() - started) / MAX_SHARE)

    def _copy(self) -> None:
        try:
            with retrying_with(ONCE):
                for path, uri in self._targets.items():
                    if path.exists():
                        upload(path, uri, is_growing=True)
        except (DinopipeError, OSError) as error:
            logger.warning("not copied to the store: %s", error)
