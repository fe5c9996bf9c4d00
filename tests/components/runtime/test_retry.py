"""retry: transient faults are waited out for a given time, everything else ends at once."""

from __future__ import annotations

import time

import pytest

from components.runtime.retry import (
    ONCE,
    QUICK,
    RetryPolicy,
    current_policy,
    retried,
    retrying_with,
)
from dinov2_core.errors import StoreRefused, StoreUnavailable, TransientError

SHORT = RetryPolicy(total_seconds=0.3, first_pause_seconds=0.02, longest_pause_seconds=0.05)


class Service:
    """Fails with an error for some calls, then answers."""

    def __init__(self, error: Exception, *, failures: int) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"


def test_a_transient_fault_is_waited_out() -> None:
    service = Service(StoreUnavailable("busy"), failures=4)
    with retrying_with(SHORT):
        assert retried(service) == "answer"
    assert service.calls == 5


@pytest.mark.parametrize("error", [StoreRefused("no"), ValueError("shape"), OSError("disk full")])
def test_what_waiting_does_not_heal_ends_at_once(error: Exception) -> None:
    service = Service(error, failures=1)
    with retrying_with(SHORT), pytest.raises(type(error)):
        retried(service)
    assert service.calls == 1


def test_a_service_that_stays_away_is_given_up_with_its_last_error() -> None:
    service = Service(StoreUnavailable("busy"), failures=10**6)
    started = time.monotonic()
    with retrying_with(SHORT), pytest.raises(TransientError, match="busy"):
        retried(service)
    assert time.monotonic() - started < 1
    assert service.calls > 2


def test_once_is_one_attempt() -> None:
    service = Service(StoreUnavailable("busy"), failures=1)
    with retrying_with(ONCE), pytest.raises(StoreUnavailable):
        retried(service)
    assert service.calls == 1


def test_the_default_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOPIPE_RETRY_SECONDS", raising=False)
    assert current_policy().total_seconds == 180
    monkeypatch.setenv("DINOPIPE_RETRY_SECONDS", "7.5")
    assert current_policy().total_seconds == 7.5
    with retrying_with(QUICK):
        assert current_policy() is QUICK
    assert current_policy().total_seconds == 7.5
