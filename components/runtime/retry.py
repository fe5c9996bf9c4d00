"""The retry policy: how long the same call is repeated while it fails for a transient reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_before_delay,
    wait_random_exponential,
)

from dinov2_core.errors import TransientError

logger = logging.getLogger(__name__)

RETRY_VARIABLE = "DINOPIPE_RETRY_SECONDS"
"""Environment variable: how long stages and ranks wait for a service that does not answer."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Pauses between attempts grow exponentially and are drawn at random up to a maximum."""

    total_seconds: float
    """From the first attempt on; none is begun later. 0 allows one attempt."""
    first_pause_seconds: float = 1.0
    """Longest pause after the first attempt."""
    longest_pause_seconds: float = 20.0
    """Longest pause after any attempt."""

    @classmethod
    def of(cls, total_seconds: float) -> RetryPolicy:
        """A policy whose first pauses fit a short time as well as a long one."""
        return cls(total_seconds=total_seconds, first_pause_seconds=min(1.0, total_seconds / 10))


QUICK = RetryPolicy.of(2)
"""For checks that a user waits for."""
ONCE = RetryPolicy.of(0)
"""For calls whose callers try again themselves."""

_chosen: ContextVar[RetryPolicy | None] = ContextVar("retry policy", default=None)


def current_policy() -> RetryPolicy:
    """The policy of the innermost `retrying_with` on this thread, else the default one."""
    return _chosen.get() or RetryPolicy.of(float(os.environ.get(RETRY_VARIABLE) or 180))


@contextmanager
def retrying_with(policy: RetryPolicy) -> Iterator[None]:
    """Let calls of this thread be repeated in another way than the default one."""
    token = _chosen.set(policy)
    try:
        yield
    finally:
        _chosen.reset(token)


def retried(call: Callable[[], _T]) -> _T:
    """The result of a call, repeated while it raises TransientError and the policy allows it.

    Raises:
        TransientError: Of the last attempt.
    """
    policy = current_policy()
    attempts = Retrying(
        retry=retry_if_exception_type(TransientError),
        stop=stop_before_delay(policy.total_seconds),
        wait=wait_random_exponential(
            multiplier=policy.first_pause_seconds, max=policy.longest_pause_seconds
        ),
        before_sleep=_log_attempt,
        reraise=True,
    )
    return attempts(call)


def _log_attempt(state: RetryCallState) -> None:
    """Log the first failure and then every fifth, with what is being waited for."""
    error = state.outcome.exception() if state.outcome is not None else None
    level = logging.INFO if state.attempt_number % 5 == 1 else logging.DEBUG
    logger.log(level, "trying again (attempt %d failed): %s", state.attempt_number, error)
