"""byte_budget: threads wait until their bytes fit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dinov2_core.curation.byte_budget import ByteBudget


def test_threads_never_hold_more_than_the_limit() -> None:
    budget, lock = ByteBudget(10), threading.Lock()
    held, most = 0, 0

    def work(num_bytes: int) -> None:
        nonlocal held, most
        with budget.hold(num_bytes):
            with lock:
                held += num_bytes
                most = max(most, held)
            threading.Event().wait(0.002)
            with lock:
                held -= num_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 7, 4, 6, 10, 1, 2, 5] * 4))
    assert 5 < most <= 10


def test_more_than_the_limit_is_held_alone() -> None:
    budget, entered = ByteBudget(10), threading.Event()

    def wait() -> None:
        with budget.hold(1):
            entered.set()

    with budget.hold(1000):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.05)
    thread.join(10)
    assert entered.is_set()


def test_a_failure_frees_the_bytes() -> None:
    budget = ByteBudget(10)
    for _ in range(2):
        with pytest.raises(OSError, match="disk"), budget.hold(10):
            raise OSError("disk")
