"""Ctrl-C and SIGTERM: at once where nothing can be half done, between two steps elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dinov2_core.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MOST_REQUESTS = 2
"""A third request ends the program wherever it is."""


@contextmanager
def sigterm_like_interrupt() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, where Ctrl-C raises KeyboardInterrupt."""
    with _handlers(_raise_exception, of=(signal.SIGTERM,)):
        yield


class StopRequests:
    """Counts Ctrl-C and SIGTERM within a `with` block, instead of raising in the middle of it."""

    def __init__(self) -> None:
        self._signals: list[int] = []
        self._handlers = _handlers(self._note, of=SIGNALS)

    def __enter__(self) -> StopRequests:
        self._handlers.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handlers.__exit__(*exception)

    @property
    def count(self) -> int:
        """How often the program was asked to stop."""
        return len(self._signals)

    def raise_first(self, message: str) -> None:
        """Raise what the first request would have raised; nothing without one."""
        if self._signals:
            raise _exception_of(self._signals[0], message)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        if self.count > MOST_REQUESTS:
            raise _exception_of(number)


def _raise_exception(number: int, _frame: FrameType | None) -> None:
    raise _exception_of(number)


def _exception_of(number: int, message: str = "interrupted") -> KeyboardInterrupt:
    return Terminated(message) if number == signal.SIGTERM else KeyboardInterrupt(message)


@contextmanager
def _handlers(
    handler: Callable[[int, FrameType | None], None], *, of: tuple[signal.Signals, ...]
) -> Iterator[None]:
    """Handle signals of this process, but for those that whoever started it has it ignore.

    Python handles signals on the main thread only; elsewhere nothing is changed.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    handled = [number for number in of if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, handler) for number in handled if on_main_thread}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)
