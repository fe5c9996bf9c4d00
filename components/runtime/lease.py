"""Leases: directories of an object store that one run at a time works in."""

from __future__ import annotations

import fcntl
import logging
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pydantic import ValidationError

from components.runtime import s3
from components.runtime.cache_index import index_file
from components.runtime.fencing import check_fence, fence, lift_fence
from components.runtime.retry import QUICK, retrying_with
from components.runtime.uris import local_path
from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import DinopipeError, InputError, LeaseLost, ObjectUnreadable

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""Without a renewal for so long a directory is free again."""
RENEWALS = 4
"""How often a lease is renewed in its time."""
INTERRUPT_SECONDS = 2.0
"""Between two interrupts of work that goes on without the lease: libraries may swallow one."""
INTERRUPT = signal.SIGUSR2


@contextmanager
def leased(
    uri: str, *, owner: str, seconds: float = LEASE_SECONDS, waits_for_owner: bool = False
) -> Iterator[Lease]:
    """Hold a directory of a store; clocks of those who want it should agree to seconds.

    Should another run take the lease over, then LeaseLost is raised in the main thread and by
    every write below the directory. A restart with the same cache takes its own lease again at
    once: a random identity of the holder lies in the cache.

    Args:
        uri: Object that says who holds the directory that it lies in.
        owner: Who holds it, for messages, such as `run RUN_ID`.
        seconds: How long the directory stays held after the holder's death.
        waits_for_owner: Whether to wait for the lease of another holder with this owner to end:
            an earlier attempt of the same run, which may have been killed.

    Raises:
        InputError: Another run holds it.
        LeaseLost: Another run has taken it meanwhile.
        StoreRefused, StoreUnavailable: The store refuses, or does not answer.
    """
    with _identity(uri) as identity:
        lease = Lease(uri, owner=owner, holder=identity, seconds=seconds)
        lease.take(waits_for_owner=waits_for_owner)
        with _interrupted_when_lost(lease):
            yield lease


class Lease:
    """One holder's lease of one directory."""

    def __init__(self, uri: str, *, owner: str, holder: str, seconds: float) -> None:
        self.directory = uri.rpartition("/")[0]
        self._uri = uri
        self._owner = owner
        self._holder = holder
        self._seconds = seconds
        self._etag = ""
        self._lock = threading.Lock()

    def take(self, *, waits_for_owner: bool) -> None:
        """Write the lease, unless another holder has it.

        Raises:
            InputError: Another holder has it, and does not merely seem to.
        """
        lift_fence(self.directory)
        first_end = 0.0
        while not self._try_to_take():
            found = self._read()
            left = found.until - time.time()
            if left <= 0:  # it has ended just now
                continue
            first_end = first_end or found.until
            may_be_dead = found.owner == self._owner and found.until == first_end
            if not waits_for_owner or not may_be_dead:
                raise InputError(
                    f"{self.directory} is in use by {found.owner}; wait for that to end, or, if it "
                    f"was killed, for {left:.0f} s"
                )
            logger.info("waiting for an earlier attempt's lease of %s to end", self.directory)
            time.sleep(min(self._seconds / RENEWALS, left + 0.05))

    def _try_to_take(self) -> bool:
        stored = s3.find(self._uri)
        found = self._read()
        if found.holder != self._holder and found.until > time.time():
            return False
        try:
            self._write(replaces=stored.etag if stored else "")
        except s3.ObjectTaken:  # this very moment
            return self._is_own_write()
        return True

    def confirm(self) -> None:
        """Make sure, by renewing it, that the lease is still held.

        Raises:
            LeaseLost: Another run has taken it.
        """
        check_fence(self.directory)
        with self._lock:
            try:
                self._write(replaces=self._etag)
            except s3.ObjectTaken:
                if self._is_own_write():
                    return
                taker = self._read().owner or "somebody who removed the lease"
                reason = f"{self.directory} was taken over by {taker}; this run stops"
                fence(self.directory, reason=reason)
                raise LeaseLost(reason) from None

    def renew_until(self, ended: threading.Event) -> bool:
        """Renew the lease now and then; whether it was lost before the event was set."""
        while not ended.wait(self._seconds / RENEWALS):
            try:
                with retrying_with(QUICK):
                    self.confirm()
            except LeaseLost as error:
                logger.error("%s", error)
                return True
            except DinopipeError as error:
                logger.warning("the lease could not be renewed: %s", error)
        return False

    def release(self) -> None:
        """Remove the lease if it is still held."""
        try:
            with retrying_with(QUICK):
                if self._read().holder == self._holder:
                    s3.delete([self._uri])
        except DinopipeError as error:
            logger.warning("the lease could not be given back, it ends by itself: %s", error)

    def _read(self) -> _Content:
        """What the object holds; one that is absent or no lease holds nothing."""
        try:
            return _Content.model_validate_json(s3.read(self._uri))
        except (ObjectUnreadable, ValidationError):
            return _Content()

    def _write(self, *, replaces: str) -> None:
        until = time.time() + self._seconds
        content = _Content(owner=self._owner, holder=self._holder, until=until)
        self._etag = s3.write(self._uri, content.model_dump_json().encode(), replaces=replaces)

    def _is_own_write(self) -> bool:
        """Whether the object is of this holder: a write was applied, and its answer was lost."""
        stored = s3.find(self._uri)
        if stored is None or self._read().holder != self._holder:
            return False
        self._etag = stored.etag
        return True


class _Content(Frozen):
    """What a lease's object holds."""

    owner: str = ""
    """For messages."""
    holder: str = ""
    """Random identity."""
    until: float = 0.0
    """End unless it is renewed, seconds since 1970."""


@contextmanager
def _identity(uri: str) -> Iterator[str]:
    """A random identity that lies in this node's cache, for one process at a time.

    Raises:
        InputError: A process with the same cache holds the lease.
    """
    path = index_file(local_path(uri), ".holder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            directory = uri.rpartition("/")[0]
            raise InputError(
                f"{directory} is in use by another process of this machine; wait for that to end"
            ) from error
        file.seek(0)
        identity = file.read().strip()
        if not identity:
            identity = secrets.token_hex(16)
            file.write(identity)
            file.flush()
        yield identity


@contextmanager
def _interrupted_when_lost(lease: Lease) -> Iterator[None]:
    """Renew a lease in the background, and raise LeaseLost in the main thread when it is lost."""
    ended = threading.Event()
    main = threading.main_thread()
    is_main = threading.current_thread() is main

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if not ended.is_set():
            check_fence(lease.directory)  # raises

    def renew() -> None:
        if not lease.renew_until(ended) or not is_main:
            return
        while not ended.is_set():
            signal.pthread_kill(main.ident or 0, INTERRUPT)
            ended.wait(INTERRUPT_SECONDS)

    earlier = signal.signal(INTERRUPT, interrupt) if is_main else None
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if is_main:
            signal.signal(INTERRUPT, earlier or signal.SIG_DFL)
        lease.release()
