from __future__ import annotations

import signal
import threading

import pytest

from components.runtime.interrupts import StopRequests, sigterm_like_interrupt
from dinov2_core.errors import Terminated


def test_sigterm_raises_where_an_interrupt_would_and_only_within() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_like_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (signal.SIGTERM, signal.SIGINT, Terminated),
        (signal.SIGINT, signal.SIGTERM, KeyboardInterrupt),
    ],
)
def test_requests_are_counted_and_the_first_decides(
    first: signal.Signals, second: signal.Signals, kind: type[KeyboardInterrupt]
) -> None:
    with StopRequests() as stop:
        assert stop.count == 0
        stop.raise_first("nobody asked")
        signal.raise_signal(first)
        signal.raise_signal(second)
        assert stop.count == 2
    with pytest.raises(kind, match="go on later") as caught:
        stop.raise_first("go on later")
    assert type(caught.value) is kind


def test_a_third_request_ends_the_program_wherever_it_is() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequests():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.count == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_on_another_thread_nothing_is_changed() -> None:
    handlers = []

    def work() -> None:
        with StopRequests():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
